"""A cache: any pieces of a row give the logits of the whole row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from longctx import parallel
from longctx.attention import VARIANTS, AttentionConfig, make_attention
from longctx.attention.base import Attention
from longctx.attention.cache_spec import empty_cache
from longctx.costs.hlo import program_cost
from longctx.decoding import cache as cache_lib
from longctx.masks import KVRetention, Primitive
from longctx.models.transformer import Transformer, TransformerConfig

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


def read_in_pieces(model, tokens, pieces, *, capacity, mesh=None):
  """The logits of all the tokens, and the cache."""
  cache = cache_lib.init(model, batch_size=B, capacity=capacity, mesh=mesh)
  extend = jax.jit(lambda cache, x: cache_lib.extend(model, cache, x))
  found = []
  for part in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
    logits, cache = extend(cache, jnp.asarray(part))
    found.append(logits)
  return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize('position_encoding', ['rope', 'learned', 'none'])
@pytest.mark.parametrize(
  'pieces', [[23], [10, 1, 1, 10, 1], [1] * 23], ids=['whole', 'mixed', 'ones']
)
def test_any_pieces_give_the_logits_of_the_whole(pieces, position_encoding):
  model = make_model(position_encoding=position_encoding, max_positions=T)
  tokens = make_tokens()
  logits, cache = read_in_pieces(model, tokens, pieces, capacity=T)
  expected = model(jnp.asarray(tokens))
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  assert (cache.lengths == T).all()
  assert cache.row_bytes == model.state_bytes(T)


def test_rows_of_different_lengths_go_on_from_their_own_ends():
  model, tokens = make_model(), make_tokens()
  prompts = np.array([7, 3])
  valid = np.arange(7) < prompts[:, None]
  cache = cache_lib.init(model, batch_size=B, capacity=T)
  last = cache_lib.last_place(jnp.asarray(valid))
  first = np.where(valid, tokens[:, :7], 0)
  logits, cache = cache_lib.extend(
    model,
    cache,
    jnp.asarray(first),
    valid=jnp.asarray(valid),
    query_indices=last,
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


@pytest.mark.parametrize(
  ('config', 'capacity'), [(CONFIG, T), (ENDLESS, None)], ids=['', 'endless']
)
def test_eight_devices_give_the_logits_of_one(config, capacity):
  model, tokens = make_model(config), make_tokens()
  mesh = parallel.make_mesh(seq=8)
  logits, cache = read_in_pieces(
    model, tokens, [8, 13, 1, 1], capacity=capacity, mesh=mesh
  )
  np.testing.assert_allclose(logits, model(jnp.asarray(tokens)), atol=2e-5)
  for spec, arrays in zip(cache.specs, cache.layers, strict=True):
    for entry, x in zip(spec, arrays, strict=True):
      shards = 1 if entry.retention is None else 8
      assert x.addressable_shards[0].data.size == x.size // shards


def test_what_a_token_sends_does_not_grow_with_the_cache():
  model, mesh = make_model(num_kv_heads=4), parallel.make_mesh(seq=4)
  token = jnp.zeros((B, 1), jnp.int32)

  def cost(capacity):
    cache = cache_lib.init(model, batch_size=B, capacity=capacity, mesh=mesh)

    def read(layers, x):
      before = dataclasses.replace(cache, layers=layers)
      logits, after = cache_lib.extend(model, before, x)
      return logits, after.layers

    extend = jax.jit(read, donate_argnums=0)
    return program_cost(extend.lower(cache.layers, token).compile())

  small, large = cost(1024), cost(4096)
  assert small.wire_bytes == large.wire_bytes
  # Of the 3072 more slots, keys and values, a device holds a quarter. They are
  # there once, and once more while they are written and read.
  more = 3072 * 2 * CONFIG.d_model * 4 * B // 4
  assert more <= large.device_bytes - small.device_bytes <= 3 * more


@pytest.mark.parametrize(
  'layer',
  [
    'full',
    'moba(block_size=16, top_k=2)',
    'nsa(block_size=32, top_n=4, window=32)',
  ],
)
def test_a_token_copies_no_cache(layer):
  model = make_model(
    d_model=64, num_heads=2, num_kv_heads=2, short_conv=0, layers=(layer,)
  )
  cache = cache_lib.init(model, batch_size=1, capacity=4096)

  def read(layers, lengths, x):
    before = dataclasses.replace(cache, layers=layers, lengths=lengths)
    logits, after = cache_lib.extend(model, before, x)
    return logits, after.layers

  extend = jax.jit(read, donate_argnums=0)
  token = jnp.zeros((1, 1), jnp.int32)
  program = extend.lower(cache.layers, cache.lengths, token).compile()
  memory = program.memory_analysis()
  keys = max(x.nbytes for x in cache.layers[0])
  assert memory.temp_size_in_bytes < keys / 2


def test_a_mesh_that_rows_do_not_fit_is_refused():
  with pytest.raises(ValueError, match='batch=1 must be a multiple'):
    cache_lib.init(
      make_model(), batch_size=1, capacity=4, mesh=parallel.make_mesh(data=2)
    )


def test_bfloat16_keeps_bfloat16_keys_and_float32_states():
  model = make_model(dtype='bfloat16')
  cache = cache_lib.init(model, batch_size=B, capacity=T)
  kept = [sorted({x.dtype.name for x in arrays}) for arrays in cache.layers]
  assert kept == [['bfloat16'], ['bfloat16', 'float32'], ['bfloat16']]
  assert cache.row_bytes == model.state_bytes(T, 'bfloat16')


@pytest.mark.parametrize(
  ('changes', 'capacity', 'error', 'message'),
  [
    ({}, None, ValueError, 'give a capacity'),
    ({}, 0, ValueError, 'capacity=0 must be at least 1'),
    (
      dict(position_encoding='learned', max_positions=9),
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


def test_sinks_and_window_stream_for_100_000_tokens():
  """One program, one size of cache, the numbers of the masked attention."""
  tokens, at_once = 100_000, 1000
  layer = make_attention(
    'streaming(num_sinks=4, window=12, cache_positions=True)',
    AttentionConfig(
      d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, value_dim=4
    ),
    rngs=nnx.Rngs(0),
  )
  x = np.random.default_rng(0).normal(size=(1, tokens, 8)).astype(np.float32)
  spec = layer.cache_spec(None)

  @functools.partial(jax.jit, donate_argnums=0)
  def read(cache, lengths, x):
    def one(carry, x):
      cache, lengths = carry
      out, cache = layer.apply_with_cache(
        x[:, None], spec=spec, cache=cache, lengths=lengths
      )
      return (cache, lengths + 1), out[:, 0]

    (cache, lengths), out = lax.scan(one, (cache, lengths), x.swapaxes(0, 1))
    return cache, lengths, out.swapaxes(0, 1)

  cache, lengths = empty_cache(spec, 1), jnp.zeros(1, jnp.int32)
  found, alive = [], set()
  for part in np.split(x, tokens // at_once, axis=1):
    cache, lengths, out = read(cache, lengths, part)
    found.append(np.asarray(out))
    alive.add(sum(entry.nbytes for entry in cache))
  assert read._cache_size() == 1
  assert alive == {layer.state_bytes(tokens, 'float32')} == {2 * 16 * 8 * 4}
  expected = jax.jit(lambda x: layer(x))(jnp.asarray(x))
  np.testing.assert_allclose(
    np.concatenate(found, axis=1), expected, atol=1e-5, rtol=0
  )


@dataclasses.dataclass(frozen=True)
class Nothing(Primitive):
  """No key for any query."""

  def allowed(self, q_positions, k_positions):
    return (q_positions != q_positions) & (k_positions != k_positions)

  @property
  def is_causal(self):
    return True

  def kv_retention(self):
    return KVRetention(0, 0)


def test_a_mask_that_allows_no_key_gives_zeros_as_the_whole_row_does(
  monkeypatch,
):
  class NoAttention(Attention):
    mask = Nothing()

  monkeypatch.setitem(VARIANTS, 'nothing', NoAttention)
  model = make_model(layers=('nothing',), short_conv=0)
  tokens = make_tokens()
  found, _ = read_in_pieces(model, tokens, [20, 1, 2], capacity=None)
  np.testing.assert_allclose(found, model(jnp.asarray(tokens)), atol=1e-5)
