"""A cache: any pieces of a row give the logits of the whole row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import cache as cache_lib
from longctx.model import Transformer, TransformerConfig

B, T, V = 2, 23, 11
CONFIG = TransformerConfig(
  vocab_size=V,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
  short_conv=3,
  layers=('sliding_window(window=5)', 'linear(chunk_size=8)', 'full'),
)
ENDLESS = dataclasses.replace(
  CONFIG, layers=('streaming(num_sinks=2, window=4)', 'gated_deltanet')
)

COSFORMER = "feature_map='cosformer', feature_arguments={'max_length': 9}"


def make_model(config=CONFIG, **changes):
  config = dataclasses.replace(config, **changes)
  return Transformer(config, rngs=nnx.Rngs(0))


def make_tokens():
  return np.random.default_rng(0).integers(0, V, (B, T))


def read_in_pieces(model, tokens, pieces, *, capacity):
  """The logits of all the tokens, and the cache."""
  cache = cache_lib.init(model, batch_size=B, capacity=capacity)
  extend = jax.jit(lambda cache, x: cache_lib.extend(model, cache, x))
  found = []
  for part in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
    logits, cache = extend(cache, jnp.asarray(part))
    found.append(logits)
  return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize('positions', ['rope', 'learned', 'none'])
@pytest.mark.parametrize(
  'pieces', [[23], [10, 1, 1, 10, 1], [1] * 23], ids=['whole', 'mixed', 'ones']
)
def test_any_pieces_give_the_logits_of_the_whole(pieces, positions):
  model = make_model(positions=positions, max_positions=T)
  tokens = make_tokens()
  logits, cache = read_in_pieces(model, tokens, pieces, capacity=T)
  expected = model(jnp.asarray(tokens))
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  assert (cache.lengths == T).all()
  assert cache.row_bytes == model.state_bytes(T)


def test_rows_of_different_lengths_go_on_from_their_own_ends():
  model, tokens = make_model(), make_tokens()
  prompts = np.array([7, 3])
  new = np.arange(7) < prompts[:, None]
  cache = cache_lib.init(model, batch_size=B, capacity=T)
  read = cache_lib.last_place(jnp.asarray(new))
  first = np.where(new, tokens[:, :7], 0)
  logits, cache = cache_lib.extend(
    model, cache, jnp.asarray(first), new=jnp.asarray(new), read=read
  )
  expected = model(jnp.asarray(tokens))
  for row, length in enumerate(prompts):
    np.testing.assert_allclose(
      logits[row, 0], expected[row, length - 1], atol=2e-5
    )
  after = tokens[np.arange(B), prompts][:, None]
  logits, cache = cache_lib.extend(model, cache, jnp.asarray(after))
  for row, length in enumerate(prompts):
    np.testing.assert_allclose(logits[row, 0], expected[row, length], atol=2e-5)
  assert cache.lengths.tolist() == [8, 4]


def test_endless_streams_keep_what_a_window_and_a_state_need():
  model, tokens = make_model(ENDLESS), make_tokens()
  logits, cache = read_in_pieces(model, tokens, [9, 9, 1, 4], capacity=None)
  np.testing.assert_allclose(logits, model(jnp.asarray(tokens)), atol=2e-5)
  assert cache.row_bytes == model.state_bytes(10**6)
  sizes = [x.shape[1] for x in cache.layers[0]]
  # Tails of three convolutions, then the keys and values of six slots.
  assert sizes == [2, 2, 2, 6, 6]


def test_bfloat16_keeps_bfloat16_keys_and_float32_states():
  model = make_model(dtype='bfloat16')
  cache = cache_lib.init(model, batch_size=B, capacity=T)
  kept = [sorted({x.dtype.name for x in cells}) for cells in cache.layers]
  assert kept == [['bfloat16'], ['bfloat16', 'float32'], ['bfloat16']]
  assert cache.row_bytes == model.state_bytes(T, 'bfloat16')


@pytest.mark.parametrize(
  ('changes', 'capacity', 'error', 'message'),
  [
    ({}, None, ValueError, 'give a capacity'),
    ({}, 0, ValueError, 'capacity=0 must be at least 1'),
    (
      dict(positions='learned', max_positions=9),
      10,
      ValueError,
      'at most max_positions=9',
    ),
    (
      dict(layers=('longformer(window=3, causal=False)',)),
      9,
      NotImplementedError,
      'take a causal layer',
    ),
    (
      dict(layers=(f'linear({COSFORMER})',)),
      None,
      ValueError,
      'max_length=9',
    ),
  ],
)
def test_what_cannot_be_kept_is_refused(changes, capacity, error, message):
  with pytest.raises(error, match=message):
    cache_lib.init(make_model(**changes), batch_size=1, capacity=capacity)
