"""What the head of a trained model gives to BOS, and what BOS is worth to it.

    python -m studies.sinks.measure --workdir=DIR

Writes measured.json: the sink rate, attention to BOS of triggers' queries
(active) and of all others (dormant), and the loss with and without BOS.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.analysis import hooks, model_scores, probes
from longctx.attention.context import Context
from longctx.evaluation import sweep
from studies.common import write_measured

ROWS = 256


def measure(workdir: pathlib.Path) -> dict[str, float]:
  run = sweep.choose(sweep.open_workdir(workdir), '')
  graph, params, *_ = sweep.restore(run)
  examples = [run.task.get(run.config.seed, 'test', i) for i in range(ROWS)]
  tokens, labels = (
    np.stack([getattr(example, name) for example in examples])
    for name in ('tokens', 'labels')
  )
  is_trigger = run.task.is_trigger(tokens)
  # From the third token on: the first has nothing else to read, and the second
  # no symbol that it could copy.
  late = np.arange(tokens.shape[1]) >= 2
  # BOS in a document of its own is read by no other token.
  alone = jnp.asarray(np.arange(tokens.shape[1])[None] > 0, jnp.int32)
  alone = jnp.broadcast_to(alone, tokens.shape)

  @jax.jit
  def run_model(params):
    model = nnx.merge(graph, params)
    layers, hidden = model_scores.of_sequences(model, tokens)
    found = []

    def hook(index, layer, h, x, context):
      del index, x
      first = jax.nn.one_hot(jnp.arange(h.shape[1]), 1)[None]
      sums = probes.weighted_sums(layer, h, first, context)
      found.append(sums[..., 0].mean(2))
      return layer(h, context)

    hooks.run_with_hooks(model, tokens, hook)

    evicted = Context(segment_ids=alone)
    without = model.hidden(model.embed(tokens, evicted), evicted)
    losses = [hooks.token_losses(model, y, labels) for y in (hidden, without)]
    return layers, found[0], losses

  layers, to_bos, (loss, evicted) = jax.device_get(run_model(params))
  scores = layers[0]
  count = (late * np.ones_like(loss)).sum()
  return {
    'sink_rate': float(scores['sink_rate'].mean()),
    'first_token': float(scores['first_token'].mean()),
    'mass': float(scores['mass'].mean()),
    'active': float(to_bos[is_trigger & late].mean()),
    'dormant': float(to_bos[~is_trigger & late].mean()),
    'value_norm': float(scores['value_norm'].mean()),
    'first_value_norm': float(scores['first_value_norm'].mean()),
    'loss': float((loss * late).sum() / count),
    'loss_of_triggers': float(loss[is_trigger & late].mean()),
    'evicted_loss': float((evicted * late).sum() / count),
    'evicted_loss_of_triggers': float(evicted[is_trigger & late].mean()),
  }


if __name__ == '__main__':
  write_measured(measure, __doc__)
