"""Analyzer of a run: scores of its attention heads, and their ablation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from longctx import tasks
from longctx.analysis import hooks, model_scores, sequences
from longctx.attention.context import Context
from longctx.models.transformer import TransformerConfig
from longctx.parallel import Placement
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Float

# A head that gives this share of its attention to what a score asks for is said
# to be of that kind.
FOUND = 0.3
# Less attention than this in all is no more than noise.
LEAST_MASS = 0.05
KINDS = {
  'induction': 'prefix_matching',
  'previous_token': 'previous_token',
  'sink': 'first_token',
}

# Up to this many tokens all logits are looked at: their number grows with T².
LOGITS_UP_TO = 16384

# Parts of a sequence whose losses are told apart.
PARTS = 16


class Analyzer:
  """Measures the heads of a model on rows of its task, and on repeats.

  Rows are the first ones of a split, the same at every call; the repeats are of
  symbols that occur in them. Programs are compiled once.

  Args:
    graph: of the model, see `steps.abstract_params`.
    model: its config.
    task: what it is trained on.
    rows: sequences to look at; a mesh rounds them up.
    split: of the task, that they are from.
    seed: of the task's examples.
    placement: where they lie on a mesh; None: on one device.
    with_logits: as in `model_scores.of_sequences`; None: up to 16,384 tokens.
  """

  def __init__(
    self,
    graph: nnx.GraphDef,
    model: TransformerConfig,
    task: tasks.Task,
    *,
    rows: int = 8,
    split: str = 'validation',
    seed: int = 0,
    placement: Placement | None = None,
    with_logits: bool | None = None,
  ):
    self.graph, self.model, self.task = graph, model, task
    self.placement = placement
    if placement is not None and placement.axes.data is not None:
      rows += -rows % placement.mesh.shape['data']
    examples = [task.get(seed, split, i).arrays() for i in range(rows)]
    self.batch = {
      key: np.stack([example[key] for example in examples])
      for key in examples[0]
    }
    self.repeats = self._make_repeats(rows)
    if with_logits is None:
      with_logits = task.seq_len <= LOGITS_UP_TO
    self._with_logits = with_logits
    # Whole on every process, each of which reads them.
    whole = None
    if placement is not None:
      whole = NamedSharding(placement.mesh, PartitionSpec())
    self._scores = jax.jit(self._score, out_shardings=whole)
    self._ablated = jax.jit(self._ablate, out_shardings=whole)
    self._last: tuple[int, dict[str, Any]] | None = None

  def _make_repeats(self, rows: int) -> sequences.Sequences | None:
    tokens = self.batch['tokens']
    same = (tokens[:, 0] == tokens[0, 0]).all()
    try:
      return sequences.repeated(
        np.unique(tokens),
        rows=rows,
        seq_len=tokens.shape[1],
        first=int(tokens[0, 0]) if same else None,
      )
    except ValueError:
      # A task of a symbol or two has nothing to match.
      return None

  def measure(self, params: Any, step: int) -> dict[str, Any]:
    """Scores as JSON values; those of heads as [layer][head].

    Args:
      params: of the model.
      step: of the update that made them.

    Returns:
      What `heads` and `model_scores` give, None for what a layer has not;
      `sink_rate` over all heads; of scored tokens, `icl_score`, the loss at
      500/512 of the length minus that at 50/512 (nats, Olsson et al.), and
      `loss_by_position`, in 16 parts.
    """
    found = jax.device_get(self._scores(params, np.int32(step)))
    layers = found.pop('layers')
    names = dict.fromkeys(name for scores in layers for name in scores)
    row = {
      name: [_plain(scores.get(name)) for scores in layers] for name in names
    }
    rates = [scores['sink_rate'] for scores in layers if 'sink_rate' in scores]
    row['sink_rate_by_head'] = row.pop('sink_rate', [])
    row['sink_rate'] = _plain(np.concatenate(rates).mean() if rates else None)
    row |= _plain(found)
    self._last = step, row
    return row

  def _score(self, params: Any, step: Array) -> dict[str, Any]:
    model = nnx.merge(self.graph, params)
    batch = {name: jnp.asarray(value) for name, value in self.batch.items()}
    layers, hidden = model_scores.of_sequences(
      model,
      batch['tokens'],
      self._context(batch, step),
      with_logits=self._with_logits,
    )
    if self.repeats is not None:
      arrays = dataclasses.asdict(self.repeats)
      of_repeats = model_scores.of_repeats(
        model,
        **{name: jnp.asarray(value) for name, value in arrays.items()},
        context=self._context_of_repeats(step),
      )
      layers = [a | b for a, b in zip(layers, of_repeats, strict=True)]
    if self.placement is not None:
      hidden = self.placement.into_natural(hidden)
    return {'layers': layers, **self._losses(model, hidden)}

  def _context(self, batch: dict[str, Array], step: Array) -> Context:
    segment_ids = batch.get('segment_ids')
    placement = self.placement
    return Context(segment_ids=segment_ids, step=step, placement=placement)

  def _context_of_repeats(self, step: Array) -> Context:
    """The mesh, with a layout of their length."""
    placement = self.placement
    if placement is not None:
      seq_len, layout = self.repeats.tokens.shape[1], placement.layout
      layout = SequenceLayout(layout.name, seq_len, layout.num_shards)
      placement = dataclasses.replace(placement, layout=layout)
    return Context(step=step, placement=placement)

  def _losses(
    self, model: Any, hidden: Float[Array, 'B T D']
  ) -> dict[str, Array]:
    weights = np.asarray(self.batch['weights'])
    T = weights.shape[1]
    losses = hooks.token_losses(
      model, hidden, jnp.asarray(self.batch['labels'])
    )

    def mean(where):
      """Of scored tokens; NaN where there are none."""
      where = weights * where
      if not where.sum():
        return jnp.asarray(jnp.nan)
      return jnp.sum(losses * where) / where.sum()

    at, near = np.arange(T), max(1, T // 64)
    around = lambda place: mean(abs(at - round(T * place / 512)) <= near)
    icl_score = around(500) - around(50)
    if 'segment_ids' in self.batch:
      # Places in the row are none in a document.
      icl_score = jnp.asarray(jnp.nan)
    by_part = [mean(at * PARTS // T == part) for part in range(PARTS)]
    return {'icl_score': icl_score, 'loss_by_position': jnp.stack(by_part)}

  def ablate(self, params: Any, step: int) -> dict[str, Any]:
    """What the task's rows are answered like without the heads found.

    Args:
      params: of the model.
      step: of the update that made them.

    Returns:
      `accuracy` and `loss` of the model as it is; per kind in KINDS, where a
      head's score is above 0.3, `heads` [[layer, head]] with `accuracy` and
      `loss` when they are all silent, and `mean_accuracy` and `mean_loss` when
      they say what they say on average; `each`, accuracy without each head
      alone, as [layer][head].
    """
    known = self._last is not None and self._last[0] == step
    scores = self._last[1] if known else self.measure(params, step)
    sizes = self._heads(params)
    everyone = [np.ones(size, np.float32) for size in sizes]
    run = lambda *how: _plain(self._ablated(params, np.int32(step), *how))
    row = run(everyone, False)
    for kind, name in KINDS.items():
      gates = [gate.copy() for gate in everyone]
      for layer, values in enumerate(scores.get(name, [])):
        if values is not None:
          gates[layer][of_mass(values, scores['mass'][layer]) > FOUND] = 0
      silent = [
        [layer, int(head)]
        for layer, gate in enumerate(gates)
        for head in np.flatnonzero(gate == 0)
      ]
      if silent:
        mean = {f'mean_{key}': y for key, y in run(gates, True).items()}
        row[kind] = {'heads': silent, **run(gates, False), **mean}
    row['each'] = []
    for layer, size in enumerate(sizes):
      accuracies = []
      for head in range(size):
        gates = [gate.copy() for gate in everyone]
        gates[layer][head] = 0
        accuracies.append(run(gates, False)['accuracy'])
      row['each'].append(accuracies)
    return row

  def _heads(self, params: Any) -> list[int]:
    """Heads of each layer, which a layer's string may have changed."""

    def means(params):
      model = nnx.merge(self.graph, params)
      tokens = jnp.zeros((1, 2), jnp.int32)
      return hooks.head_means(model, tokens, Context(step=1))

    return [mean.shape[0] for mean in jax.eval_shape(means, params)]

  def _ablate(self, params, step, gates, use_means) -> dict[str, Array]:
    model = nnx.merge(self.graph, params)
    batch = self.batch
    if self.placement is not None:
      batch = self.placement.layout.place(batch)
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    tokens, context = batch['tokens'], self._context(batch, step)
    means = hooks.head_means(model, tokens, context)
    means = [jnp.where(use_means, mean, 0) for mean in means]
    hidden = hooks.ablate_heads(model, tokens, gates, means, context)
    sums = model.scored(hidden, batch['labels'], batch['weights'], None)
    total = jnp.maximum(sums['weight'], 1e-9)
    return {
      'accuracy': sums['correct'] / total,
      'loss': sums['loss'] / total,
    }


def of_mass(values: Any, mass: Any) -> np.ndarray:
  """Scores as shares of what a head reads at all, where that is below one."""
  mass = np.array(mass, np.float64)
  return np.array(values) / np.where((mass > LEAST_MASS) & (mass < 1), mass, 1)


def _plain(value: Any) -> Any:
  """As JSON has it: lists, floats, and None for what is no number."""
  if value is None:
    return None
  if isinstance(value, dict):
    return {name: _plain(entry) for name, entry in value.items()}
  if isinstance(value, list) or np.ndim(value):
    return [_plain(entry) for entry in value]
  return float(value) if math.isfinite(float(value)) else None
