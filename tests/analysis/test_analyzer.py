"""What a run's heads do, and what it is without them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import parallel, tasks
from longctx.analysis import heads, hooks, model_scores
from longctx.analysis.analyzer import Analyzer
from longctx.attention.context import Context
from longctx.models.transformer import Transformer, TransformerConfig
from longctx.parallel import Placement
from longctx.parallel.layout import SequenceLayout
from longctx.training import steps

TASK = tasks.make_task(
  'induction', seq_len=20, vocab_size=12, min_period=8, max_period=10
)
MODEL = TransformerConfig(
  vocab_size=12,
  layers=('full', 'linear(num_heads=4, head_dim=4)'),
  d_model=16,
  num_heads=2,
  logits_chunk=8,
)


@functools.cache
def trained():
  """(graph, params) of a model with weights of some size."""
  graph, _ = steps.abstract_params(MODEL)
  model = Transformer(MODEL, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
  return graph, jax.tree.map(lambda w: 2 * w, params)


@functools.cache
def analyzer():
  return Analyzer(trained()[0], MODEL, TASK, rows=3)


@functools.cache
def measured():
  return analyzer().measure(trained()[1], 1)


def test_scores_are_json_by_layer_and_head():
  row = json.loads(json.dumps(measured(), allow_nan=False))
  for name in ('first_token', 'prefix_matching', 'copying', 'span'):
    assert [len(layer) for layer in row[name]] == [2, 4]
  # There are no logits in a recurrence.
  assert row['max_logit'][1] is None and row['entropy'][1] is None
  assert 0 <= row['sink_rate'] <= 1
  # Only repeats are scored, so that nothing early is.
  assert row['loss_by_position'][0] is None and row['icl_score'] is None
  assert row['loss_by_position'][-1] > 0


def test_a_layer_that_cannot_be_analysed_has_norms_alone():
  nsa = 'nsa(compress_block=4, stride=2, block_size=4, top_n=3, window=8)'
  model = dataclasses.replace(MODEL, layers=(nsa,))
  graph, _ = steps.abstract_params(model)
  params = Transformer(model, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.split(params, nnx.Param)[1])
  row = Analyzer(graph, model, TASK, rows=2).measure(params, 1)
  assert 'first_token' not in row and row['sink_rate'] is None
  assert len(row['value_norm'][0]) == 2 * 3


def test_a_mesh_measures_the_same():
  mesh = parallel.make_mesh(data=2, seq=2)
  placement = Placement(mesh, SequenceLayout('zigzag', 20, 2), 'ring')
  graph, params = trained()
  here = Analyzer(graph, MODEL, TASK, rows=4)
  there = Analyzer(graph, MODEL, TASK, rows=3, placement=placement)
  expected, actual = (a.measure(params, 1) for a in (here, there))
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    if name in ('span', 'massive'):
      # Signs lie elsewhere; a median is of some of the activations.
      continue
    flat = lambda y: [x for x in jax.tree.leaves(y) if x is not None]
    np.testing.assert_allclose(
      flat(actual[name]), flat(value), rtol=2e-3, atol=2e-4
    )


def test_losses_of_tokens_are_those_of_training():
  graph, params = trained()
  model = nnx.merge(graph, params)
  batch = {name: jnp.asarray(y) for name, y in analyzer().batch.items()}
  hidden = model.hidden(model.embed(batch['tokens']))
  losses = hooks.token_losses(model, hidden, batch['labels'])
  expected = model.loss(batch['tokens'], batch['labels'], batch['weights'])
  np.testing.assert_allclose(
    jnp.sum(losses * batch['weights']), expected['loss'], rtol=1e-5
  )


def test_silent_heads_say_nothing_or_their_mean():
  graph, params = trained()
  model = nnx.merge(graph, params)
  tokens = jnp.asarray(analyzer().batch['tokens'])
  everyone = [jnp.ones(2), jnp.ones(4)]
  expected = model.hidden(model.embed(tokens))
  found = hooks.ablate_heads(model, tokens, everyone)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

  # A head is silent where the rows that lead out of it are zero.
  gates = [everyone[0], jnp.array([1.0, 0, 1, 1])]
  without = nnx.merge(graph, params)
  kernel = without.blocks[1].attention.out.kernel
  kernel[...] = kernel[...].at[8:16].set(0)
  found = hooks.ablate_heads(model, tokens, gates)
  expected = without.hidden(without.embed(tokens))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

  means = hooks.head_means(model, tokens)
  assert [mean.shape for mean in means] == [(2, 8), (4, 8)]
  found = hooks.ablate_heads(model, tokens, gates, means)
  assert not np.allclose(found, expected, atol=1e-3)
  # What a silent head says is the same everywhere.

  def hook(index, attention, h, x, context):
    del x
    out = attention.head_outputs(h, context)
    if index == 1:
      out = out.at[:, :, 1].set(out[:, :, 1].mean((0, 1)))
    return attention.out(out.reshape(*out.shape[:2], -1))

  expected = hooks.run_with_hooks(model, tokens, hook)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_ablation_tells_each_head_and_those_found(monkeypatch):
  monkeypatch.setattr('longctx.analysis.analyzer.FOUND', 0.0)
  found = analyzer().ablate(trained()[1], 1)
  assert [len(layer) for layer in found['each']] == [2, 4]
  scores = np.concatenate(measured()['prefix_matching'])
  mass = np.concatenate(measured()['mass'])
  share = scores / np.where((mass > 0.05) & (mass < 1), mass, 1)
  assert len(found['induction']['heads']) == (share > 0).sum()
  for key in ('accuracy', 'loss', 'mean_accuracy', 'mean_loss'):
    assert np.isfinite(found['induction'][key])


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_a_head_that_copies_has_score_one(sign):
  """Embeddings one-hot, values and the way out the identity."""
  V = 8
  config = TransformerConfig(
    vocab_size=V,
    layers=('full',),
    d_model=V,
    num_heads=1,
    position_encoding='none',
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  model.embedding[...] = jnp.eye(V)
  layer = model.blocks[0].attention
  for name in ('query', 'key', 'value', 'out'):
    getattr(layer, name).kernel[...] = jnp.eye(V)
  # Sharp: a query attends to the tokens that are its own.
  layer.query.kernel[...] *= 100
  layer.out.kernel[...] *= sign
  tokens = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3]])
  h = model.blocks[0].attention_norm(model.embed(tokens))
  out = layer.head_outputs(h, Context())
  seen = np.arange(8)[None] >= 4
  placed = heads.Tokens(
    tokens, tokens, jnp.asarray(seen), jnp.ones((1, 8), bool)
  )
  score = model_scores.copying(
    model, 0, h, out, placed, jnp.arange(4), Context()
  )
  np.testing.assert_allclose(score, sign, atol=1e-3)
