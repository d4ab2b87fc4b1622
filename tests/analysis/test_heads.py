"""Scores of heads are those of the attention matrix, which they never make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import parallel
from longctx.analysis import heads, logits, model_scores, probes, sequences
from longctx.attention import AttentionConfig, make_attention
from longctx.attention.context import Context
from longctx.parallel import Placement
from longctx.parallel.layout import SequenceLayout

B, T, D, N = 2, 13, 8, 4
LAYERS = ('full', 'linear', 'deltanet', 'sigmoid')


@functools.cache
def make(layer: str):
  config = AttentionConfig(
    d_model=D, num_heads=N, num_kv_heads=N, head_dim=4, value_dim=4
  )
  layer = make_attention(layer, config, rngs=nnx.Rngs(0))
  return layer, 2 * jax.random.normal(jax.random.key(1), (B, T, D))


@functools.cache
def matrix(layer: str) -> np.ndarray:
  """A [B, N, T, T] by probes, which the conformance suite checks."""
  layer, x = make(layer)
  found = probes.weighted_sums(layer, x, jnp.eye(T)[None], Context())
  return np.moveaxis(np.asarray(found), 2, 1)


def tokens():
  return sequences.Sequences.of(
    np.random.default_rng(0).integers(5, size=(B, T)) + 10
  )


def matching(tokens: heads.Tokens, context: Context) -> list[heads.Question]:
  return [heads.prefixes(tokens, 5), heads.neighbours(tokens, 5, context)]


def placed(found: sequences.Sequences) -> heads.Tokens:
  arrays = (found.classes, found.previous, found.seen, np.ones((B, T), bool))
  return heads.Tokens(*map(jnp.asarray, arrays))


@pytest.mark.parametrize('name', LAYERS)
def test_scores_are_those_of_the_matrix(name):
  layer, x = make(name)
  A = matrix(name)
  real = jnp.ones((B, T), bool)
  found = jax.jit(
    lambda x: heads.ask(
      layer, x, [heads.positions(real, Context(), seq_len=T)], Context()
    )
  )(x)
  t, s = np.arange(T)[:, None], np.arange(T)[None]
  alpha = np.stack([A[:, :, k:, k].mean(-1) for k in range(4)], axis=-1)
  assert_close(found['first_tokens'], alpha.mean(0))
  assert_close(found['first_token'], A[..., 0].mean((0, 2)))
  assert_close(found['sink_rate'], (alpha[..., 0] > 0.3).mean(0))
  assert_close(found['mass'], A.sum(-1).mean((0, 2)))
  distance = (A * (t - s)).sum(-1).mean((0, 2)) / A.sum(-1).mean((0, 2))
  assert_close(found['distance'], distance)
  bucket = np.arange(T) * 8 // T
  by_bucket = [A[..., bucket == b].sum(-1).mean((0, 2)) for b in range(8)]
  assert_close(found['mass_by_bucket'], np.stack(by_bucket, axis=-1))
  span = (A.sum(-1) ** 2).mean((0, 2)) / (A**2).sum(-1).mean((0, 2))
  # From random signs: 16 columns of 26 queries. None is made up for weights of
  # both signs.
  known = np.isfinite(found['span'])
  assert known[span >= 1].all()
  np.testing.assert_allclose(found['span'][known], span[known], rtol=0.5)


@pytest.mark.parametrize('name', LAYERS)
def test_matching_scores_are_those_of_the_matrix(name):
  layer, x = make(name)
  A, found = matrix(name), tokens()
  scores = heads.ask(layer, x, matching(placed(found), Context()), Context())
  own = found.tokens
  before = np.concatenate([np.full((B, 1), -1), own[:, :-1]], axis=1)
  same = own[:, :, None] == own[:, None]
  behind = own[:, :, None] == before[:, None]
  causal = np.tri(T, k=-1, dtype=bool)
  seen = (same & causal).any(-1)
  assert (seen == found.seen).all()
  mean = lambda pairs: np.stack(
    [(A[:, n] * pairs).sum(-1)[seen].mean() for n in range(N)]
  )
  assert_close(scores['prefix_matching'], mean(behind))
  assert_close(scores['duplicate_token'], mean(same & causal))
  diagonal = np.diagonal(A, offset=-1, axis1=2, axis2=3)
  assert_close(scores['previous_token'], diagonal.mean((0, 2)))


def test_diagonals_of_long_sequences_are_right_on_average(monkeypatch):
  layer, _ = make('full')
  x = jax.random.normal(jax.random.key(2), (1, 256, D))
  found = sequences.Sequences.of(np.arange(256)[None] % 5)
  arrays = (found.classes, found.previous, found.seen, np.ones((1, 256), bool))
  tokens = heads.Tokens(*map(jnp.asarray, arrays))
  run = lambda: heads.ask(
    layer, x, [heads.neighbours(tokens, 5, Context())], Context(), width=64
  )
  exact = run()
  monkeypatch.setattr(heads, 'EXACT', 16)
  signs = run()
  for name, value in exact.items():
    assert value.mean() > 0.005
    np.testing.assert_allclose(signs[name], value, atol=0.01)


@pytest.mark.parametrize('name', ['full', 'softmax1', 'sigmoid'])
def test_entropy_and_largest_logit_are_those_of_the_weights(name, monkeypatch):
  layer, x = make(name)
  # Several blocks of queries, the last one not full.
  monkeypatch.setattr(logits, 'SCORES', B * N * T * 5)
  real = jnp.ones((B, T), bool)
  found = logits.statistics(layer, x, real, Context())
  A = matrix(name)
  A = A / A.sum(-1, keepdims=True)
  entropy = -np.sum(np.where(A > 0, A * np.log(np.maximum(A, 1e-30)), 0), -1)
  assert_close(found['entropy'], entropy.mean((0, 2)))
  q, k, _, _ = layer.project(x, Context())
  z = np.einsum('BTNH,BSNH->BNTS', q, k) / 2
  z = np.where(np.tri(T, dtype=bool), z, -np.inf).max((0, 2, 3))
  if name == 'sigmoid':
    assert 'max_logit' not in found
  else:
    assert_close(found['max_logit'], z)


def test_importance_is_the_sum_of_columns():
  layer, x = make('full')
  found = probes.importance(layer, x, Context())
  assert_close(found, matrix('full').sum(2))


@pytest.mark.parametrize('layout', ['zigzag', 'striped'])
def test_a_mesh_and_its_padding_change_no_score(layout):
  layer, x = make('full')
  found = tokens()

  def scores(x, tokens, context):
    position = heads.positions(tokens.real, context, seq_len=T)
    questions = [position, *matching(tokens, context)]
    answers = heads.ask(layer, x, questions, context)
    if layout == 'zigzag':
      answers |= logits.statistics(layer, x, tokens.real, context)
    return answers

  expected = scores(x, placed(found), Context())
  mesh = parallel.make_mesh(seq=4)
  placement = Placement(mesh, SequenceLayout(layout, T, 4), 'ring')
  place = model_scores.placer(placement)

  @jax.jit
  def run(x):
    arrays = [place(y) for y in (found.classes, found.previous, found.seen)]
    context = Context(placement=placement)
    at = context.true_positions(placement.layout.padded_len)
    inside = jnp.broadcast_to(at < T, arrays[0].shape)
    return scores(place(x), heads.Tokens(*arrays, real=inside), context)

  actual = run(x)
  for name, value in actual.items():
    if name == 'span':
      # The signs lie elsewhere.
      np.testing.assert_allclose(value, expected[name], rtol=0.5)
    else:
      assert_close(value, expected[name])


def test_document_starts_are_what_counts_as_first():
  layer, x = make('full')
  context = Context(segment_ids=jnp.asarray([[0] * 5 + [1] * 8] * B))
  question = heads.positions(jnp.ones((B, T), bool), context, seq_len=T)
  found = heads.ask(layer, x, [question], context)
  parts = [
    probes.weighted_sums(layer, x[:, a:b], jnp.eye(b - a)[None], Context())
    for a, b in ((0, 5), (5, 13))
  ]
  first = np.concatenate([part[..., 0] for part in parts], axis=1)
  assert_close(found['first_token'], first.mean((0, 1)))


def test_nsa_is_refused():
  config = AttentionConfig(
    d_model=D, num_heads=N, num_kv_heads=N, head_dim=4, value_dim=4
  )
  layer = make_attention(
    'nsa(compress_block=4, stride=2, block_size=4, top_n=3, window=8)',
    config,
    rngs=nnx.Rngs(0),
  )
  with pytest.raises(NotImplementedError, match='hidden layer'):
    probes.weighted_sums(layer, make('full')[1], jnp.eye(T)[None], Context())


def test_repeats_come_again_and_too_few_symbols_are_refused():
  found = sequences.repeated(np.arange(40), rows=3, seq_len=64, first=0)
  assert found.tokens.shape == (3, 64)
  assert (found.tokens[:, 1:26] == found.tokens[:, 26:51]).all()
  assert (found.tokens[:, 0] == 0).all() and (found.tokens[:, 1:] > 0).all()
  assert not found.seen[:, :26].any() and found.seen[:, 26:].all()
  with pytest.raises(ValueError, match='period of 7'):
    sequences.repeated(np.arange(8), rows=1, seq_len=64, first=0)


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)
