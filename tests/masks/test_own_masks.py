"""Masks that define `allowed` alone, and declarations that are false."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import masks, parallel
from longctx.analysis import leak_probe
from longctx.attention.base import Attention, AttentionConfig
from longctx.attention.cache_spec import empty_cache
from longctx.attention.context import Context
from longctx.costs.attention import hop_blocks
from longctx.ops.dot_product_attention import BlockSizes, dot_product_attention
from longctx.parallel.layout import SequenceLayout
from tests.masks.test_masks import any_mask, dense_block_map
from tests.tolerances import tolerance

RULES = {
  'modulo': lambda q, k, a, b: (q + a * k) % b == 0,
  'future': lambda q, k, a, b: k <= q + a,
  'rows without keys': lambda q, k, a, b: (q % (b + 1) != 0) & (k <= q),
  # Of one of the positions alone, in its shape.
  'queries': lambda q, k, a, b: q % (b + 1) < a,
  'keys': lambda q, k, a, b: k % (b + 1) < a,
  'bits': lambda q, k, a, b: (q ^ k) & a == 0,
  'hash': lambda q, k, a, b: (q * 31 + k * 17) * (a + 1) % 13 < b,
  'chunks': lambda q, k, a, b: q // b == k // b + a % 2,
  'far from the start': lambda q, k, a, b: (q - k == a) | (k > 5 * b),
  'table': lambda q, k, a, b: jnp.arange(997)[(q + a * k) % 997] % (b + 1) < a,
  'window': lambda q, k, a, b: (q >= k) & (q - k < 8 * a),
}


@dataclasses.dataclass(frozen=True)
class Own(masks.Primitive):
  """A mask of one's own, with nothing but `allowed`."""

  rule: str
  a: int
  b: int

  def allowed(self, q_positions, k_positions):
    return RULES[self.rule](q_positions, k_positions, self.a, self.b)


own = st.builds(
  Own, st.sampled_from(sorted(RULES)), st.integers(0, 9), st.integers(1, 9)
)
own_or_with_others = st.recursive(
  own,
  lambda inner: st.builds(
    lambda a, b, join: join(a, b),
    inner,
    inner | any_mask,
    st.sampled_from([masks.And, masks.Or]),
  ),
  max_leaves=4,
)
EXAMPLES = [
  Own('hash', 2, 6) & masks.Causal(),
  Own('rows without keys', 0, 2) | Own('modulo', 3, 7) & masks.PrefixColumns(5),
  Own('future', 3, 1) & Own('keys', 2, 2),
]
cases = pytest.mark.parametrize('mask', EXAMPLES, ids=str)


def pairs(mask, T, S):
  """The mask pair by pair, as its class says it."""
  table = [[bool(mask.allowed(q, k)) for k in range(S)]
           for q in range(T)]  # fmt: skip
  return np.array(table)


@jax.jit
def oracle(q, k, v, allowed):
  """Softmax attention under a table; zeros in rows without keys."""
  k, v = (x.repeat(q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  logits = jnp.einsum('BTNH,BSNH->BNTS', q, k) * q.shape[-1] ** -0.5
  some = allowed.any(-1, keepdims=True)
  p = jax.nn.softmax(jnp.where(allowed | ~some, logits, -jnp.inf))
  return jnp.einsum('BNTS,BSNV->BTNV', jnp.where(allowed, p, 0), v)


def inputs(T, B=1, N=2, K=1, H=4):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
  return [jax.random.normal(*x) for x in zip(keys, shapes, strict=True)]


def with_gradients(fn, *arrays):
  *qkv, cotangent = arrays
  out, vjp = jax.vjp(fn, *qkv)
  return out, *vjp(cotangent)


def assert_is_right(fn, allowed, arrays):
  """Outputs and gradients of fn(q, k, v), against those under a table."""
  found = jax.jit(functools.partial(with_gradients, fn))(*arrays)
  dense = functools.partial(oracle, allowed=allowed)
  for x, expected in zip(found, with_gradients(dense, *arrays), strict=True):
    np.testing.assert_allclose(x, expected, **tolerance('float32'))


@settings(max_examples=30)
@given(
  own_or_with_others, *([st.integers(1, 30)] * 2), *([st.integers(1, 9)] * 2)
)
def test_block_map_and_counts_equal_dense(mask, T, S, block_q, block_k):
  dense = pairs(mask, T, S)
  np.testing.assert_array_equal(mask.dense(T, S), dense)
  expected = dense_block_map(dense, block_q, block_k)
  block_map = mask.block_map(T, S, block_q, block_k)
  np.testing.assert_array_equal(block_map, expected)
  assert mask.useful_flops(T, S, 2) == 8 * dense.sum()
  # Intervals of any length, also such as begin elsewhere than at 0.
  q_edges, k_edges = np.array([T // 3, T // 2, T]), np.array([S // 3, S])
  counts = mask.count(q_edges, k_edges)
  assert counts.tolist() == [
    [dense[a:b, S // 3 :].sum()] for a, b in itertools.pairwise(q_edges)
  ]


def test_window_of_ones_own_counts_as_the_built_in_one():
  mask = Own('window', 8, 1)
  assert mask.num_allowed(2000, 2000) == 125_984
  np.testing.assert_array_equal(
    mask.block_map(2000, 2000, 128, 128),
    masks.SlidingWindow(63).block_map(2000, 2000, 128, 128),
  )
  # What others rule out is not looked at.
  few = masks.SlidingWindow(31) & mask
  assert few.num_allowed(1 << 17, 1 << 17) == 32 * (1 << 17) - 16 * 31


@settings(max_examples=5)
@given(own_or_with_others)
def test_xla_equals_dense(mask):
  T = 37
  sizes = BlockSizes(block_q=8, block_k=16)

  def fn(q, k, v):
    return dot_product_attention(
      q, k, v, mask=mask, implementation='xla', block_sizes=sizes
    )

  assert_is_right(fn, pairs(mask, T, T), inputs(T))


@cases
@pytest.mark.parametrize('implementation', ['reference', 'decode'])
def test_other_implementations_equal_dense(mask, implementation):
  def fn(q, k, v):
    return dot_product_attention(
      q, k, v, mask=mask, implementation=implementation
    )

  assert_is_right(fn, pairs(mask, 37, 37), inputs(37))


def test_kernel_equals_dense():
  mask, T = EXAMPLES[1], 130

  def fn(q, k, v):
    return dot_product_attention(q, k, v, mask=mask, implementation='pallas')

  assert_is_right(fn, pairs(mask, T, T), inputs(T))


@cases
def test_packed_documents_begin_at_zero(mask):
  """Without a declaration a mask reads the positions inside documents."""
  lengths = [9, 20, 8]
  ids = np.repeat([3, 1, 2], lengths)
  allowed = np.zeros((37, 37), bool)
  for document in (3, 1, 2):
    at = np.flatnonzero(ids == document)
    allowed[np.ix_(at, at)] = pairs(mask, len(at), len(at))
  np.testing.assert_array_equal(
    leak_probe.allowed_pairs(mask, 37, ids), allowed
  )
  context = Context(
    segment_ids=jnp.asarray(ids)[None],
    block_sizes=BlockSizes(block_q=8, block_k=8),
  )
  fn = functools.partial(context.dot_product_attention, mask=mask)
  assert_is_right(fn, allowed, inputs(37))


@pytest.mark.parametrize(
  ('mask', 'layout'),
  list(zip(EXAMPLES, ('contiguous', 'zigzag', 'striped'), strict=True)),
  ids=str,
)
def test_ring_hops_and_results_equal_dense(mask, layout):
  T, mesh = 61, parallel.make_mesh(seq=4)

  def fn(q, k, v):
    return parallel.dot_product_attention(
      q, k, v, mask=mask, mesh=mesh, layout=layout, scheme='ring'
    )

  assert_is_right(fn, pairs(mask, T, T), inputs(T))


def test_ring_skips_hops_that_no_pair_needs():
  layout = SequenceLayout('contiguous', 64, 4)
  window = Own('window', 2, 1)
  full = hop_blocks(Own('future', 99, 1), layout, 8, 8)
  assert len(full.hops[0]) + len(full.hops[-1]) > 1
  (hops,) = hop_blocks(window, layout, 8, 8).hops
  assert len(hops) == 1


CONFIG = AttentionConfig(
  d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, value_dim=4
)


class OwnAttention(Attention):
  """Softmax attention under a mask that is given."""

  def __init__(self, mask, *, rngs):
    super().__init__(CONFIG, rngs=rngs)
    self.mask = mask


@dataclasses.dataclass(frozen=True)
class Recent(masks.Primitive):
  """A mask that declares what decoding may forget."""

  window: int
  is_causal = True

  def allowed(self, q_positions, k_positions):
    offset = q_positions - k_positions
    return (offset >= 0) & (offset < self.window) & (offset % 3 != 1)

  def kv_retention(self):
    return masks.KVRetention(0, self.window)


@pytest.mark.parametrize(
  ('mask', 'slots'), [(EXAMPLES[0], 20), (Recent(6), 6)], ids=str
)
def test_decoding_equals_reading_all_at_once(mask, slots):
  layer = OwnAttention(mask, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 20, 8))
  spec = layer.cache_spec(20)
  assert {entry.shape[0] for entry in spec} == {slots}

  @jax.jit
  def read(x, cache, start):
    return layer.apply_with_cache(
      x, spec=spec, cache=cache, lengths=start[None]
    )

  cache, outs = empty_cache(spec, 1), []
  for start, stop in ((0, 9), (9, 18), (18, 19), (19, 20)):
    out, cache = read(x[:, start:stop], cache, jnp.array(start))
    outs.append(out)
  np.testing.assert_allclose(
    jnp.concatenate(outs, 1), jax.jit(layer)(x), **tolerance('float32')
  )


def test_decoding_needs_to_know_that_a_mask_is_causal():
  layer = OwnAttention(Own('window', 1, 1), rngs=nnx.Rngs(0))
  with pytest.raises(NotImplementedError, match=r'mask & masks\.Causal\(\)'):
    layer.cache_spec(20)


@dataclasses.dataclass(frozen=True)
class LateSink(Recent):
  """A mask that reads a key again which it lets caches forget."""

  def allowed(self, q_positions, k_positions):
    near = super().allowed(q_positions, k_positions)
    return near | (k_positions == 40) & (q_positions >= k_positions)


@pytest.mark.parametrize('capacity', [100, None])
def test_false_retention_is_refused_before_a_cache_forgets(capacity):
  layer = OwnAttention(LateSink(6), rngs=nnx.Rngs(0))
  # Rows that short never get there.
  assert {entry.shape[0] for entry in layer.cache_spec(40)} == {6}
  with pytest.raises(ValueError, match='against kv_retention'):
    layer.cache_spec(capacity)


def declared(
  allowed=lambda self, q, k: (q >= k) & (k % 3 == 0), **declarations
):
  """A mask of one's own with some declarations."""
  kind = type('Own', (masks.Primitive,), {'allowed': allowed, **declarations})
  return dataclasses.dataclass(frozen=True)(kind)()


class NotCausal(masks.Causal):
  def allowed(self, q_positions, k_positions):
    return q_positions >= k_positions - 2


@dataclasses.dataclass(frozen=True)
class Xor(masks.Or):
  """Says another thing of blocks than of pairs."""

  def allowed(self, q_positions, k_positions):
    return self.a.allowed(q_positions, k_positions) ^ self.b.allowed(
      q_positions, k_positions
    )


FALSE = {
  'shift_invariant': declared(shift_invariant=True),
  'no cuts': declared(cuts=lambda self, T, S: ([], [])),
  'cuts': declared(cuts=lambda self, T, S: (range(T), range(0, S, 2))),
  'is_causal': declared(lambda self, q, k: q >= k - 1, is_causal=True),
  'is_causal where no key is': declared(
    lambda self, q, k: 2 * k <= q, is_causal=True
  ),
  'kv_retention': declared(
    kv_retention=lambda self: masks.KVRetention(2, 60)
  ),
  'bounds of some': declared(
    bounds=lambda self, q, k: (q.low >= k.high, q.low < 0 * k.low)
  ),
  'bounds of all': declared(
    bounds=lambda self, q, k: (q.high >= k.low, q.low >= k.high)
  ),
  'bounds far on': declared(
    lambda self, q, k: q >= k,
    bounds=lambda self, q, k: (
      (q.high >= k.low) & (q.high < 900),
      q.low < 0 * k.low,
    ),
  ),
  'a subclass': NotCausal(),
  'a combination': Xor(masks.Causal(), masks.PrefixColumns(4)),
  'a part': masks.Causal() & declared(shift_invariant=True),
  'other pairs': declared(lambda self, q, k: k >= k.max() - q),
  'overflow': declared(lambda self, q, k: (q * q * 2**22 >= 0) & (k >= 0)),
}  # fmt: skip


@pytest.mark.parametrize('name', FALSE)
def test_false_declaration_is_refused(name):
  mask, (q, k, v, _) = FALSE[name], inputs(1000)
  for use in (
    lambda: dot_product_attention(q, k, v, mask=mask),
    lambda: jax.eval_shape(
      lambda *qkv: dot_product_attention(*qkv, mask=mask), q, k, v
    ),
    lambda: mask.num_allowed(1000, 1000),
    lambda: hop_blocks(mask, SequenceLayout('zigzag', 1000, 1), 8, 8),
  ):
    with pytest.raises(ValueError, match=r'against|NOWHERE'):
      use()


def test_true_declarations_are_taken():
  def even(self, q, k):
    return (q >= k) & (k % 2 == 0) & (k < 50)

  mask = declared(
    even,
    cuts=lambda self, T, S: (np.arange(T), np.arange(S)),
    bounds=lambda self, q, k: ((q.high >= k.low) & (k.low < 50), q.low < q.low),
    is_causal=True,
    kv_retention=lambda self: masks.KVRetention(50, 0),
  )
  assert mask.num_allowed(300, 300) == pairs(mask, 300, 300).sum()


def test_what_cannot_be_derived_is_refused():
  long = 1 << 17
  with pytest.raises(
    NotImplementedError, match='define shift_invariant or cut'
  ):
    Own('window', 8, 1).num_allowed(long, long)
  with pytest.raises(NotImplementedError, match='compute in integers'):
    declared(lambda self, q, k: k <= 0.7 * q).num_allowed(9, 9)
  with pytest.raises(TypeError, match='must return Booleans, not int64'):
    declared(lambda self, q, k: (q - k) % 2).num_allowed(9, 9)


def test_masks_that_compare_wrong_are_refused():
  class Undecorated(masks.Primitive):
    def __init__(self, n):
      self.n = n

    def allowed(self, q_positions, k_positions):
      return q_positions - k_positions < self.n

  assert Undecorated(3) == Undecorated(5)
  with pytest.raises(TypeError, match=r'dataclass\(frozen=True\)'):
    Undecorated(3).num_allowed(9, 9)

  @dataclasses.dataclass(frozen=True)
  class Uncompared(masks.Primitive):
    n: int = dataclasses.field(compare=False)

    def allowed(self, q_positions, k_positions):
      return q_positions - k_positions < self.n

  assert Uncompared(3) == Uncompared(5)
  with pytest.raises(TypeError, match='fields all compare'):
    Uncompared(3).num_allowed(9, 9)


@pytest.mark.parametrize(
  'array',
  [np.ones((8, 8), bool), np.ones((8, 8), np.float32), jnp.ones((8, 8), bool)],
  ids=['numpy', 'floats', 'jax'],
)
def test_array_as_a_mask_is_refused_by_a_line(array):
  # Under pytest annotations are checked first, and elsewhere not at all.
  plain = inspect.unwrap
  q, k, v, _ = inputs(8)
  mesh = parallel.make_mesh()
  causal, layout = masks.Causal(), SequenceLayout('zigzag', 8, 1)
  context = Context()
  for use in (
    lambda: plain(dot_product_attention)(q, k, v, mask=array),
    lambda: plain(parallel.dot_product_attention)(
      q, k, v, mask=array, mesh=mesh
    ),
    lambda: plain(Context.dot_product_attention)(context, q, k, v, mask=array),
    lambda: plain(leak_probe.allowed_pairs)(array, 8),
    lambda: plain(hop_blocks)(array, layout, 8, 8),
    lambda: causal & array,
    lambda: array & causal,
    lambda: causal | array,
    lambda: array | causal,
    lambda: masks.And(array, causal),
  ):
    with pytest.raises(TypeError):
      use()
  with pytest.raises(TypeError, match=r'rule over positions.*q_segment_ids'):
    masks.check_mask(array)
