"""The TPU kernels of attention, interpreted, against the equation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import masks
from longctx.masks import Causal, SlidingWindow
from longctx.ops.dot_product_attention import (
  BlockSizes,
  TokenIndices,
  choose,
  dot_product_attention,
  resolve,
)
from longctx.ops.dot_product_attention import (
  pallas_tpu_work_list as work_lists,
)
from longctx.ops.dot_product_attention.pallas_tpu_tiling import make_tiling
from longctx.ops.dot_product_attention.pallas_tpu_work_list import (
  make_flat_list,
)
from longctx.ops.merge import merge
from longctx.ops.target import Target, compiling_for
from tests.ops.attention_cases import (
  cases,
  check,
  documents,
  make_inputs,
  run,
  shuffled,
)
from tests.tolerances import case_id

# Three blocks, of which the last is cut off.
T = 300
BLOCKS = BlockSizes(128, 128, 128, 128)
CASES = cases(T) | {
  'causal': dict(),
  'wide-window': dict(mask=SlidingWindow(200)),
  'large-pattern': dict(
    mask=masks.BlockSparse(4, np.tri(70, 75, dtype=int)[::-1])
  ),
}
SHAPES = [
  dict(B=1, T=T, N=2, K=1, H=128, V=128),
  dict(B=2, T=140, S=261, N=6, K=2, H=64, V=16),
  dict(B=1, T=1, S=9, N=2, K=2),
  dict(B=1, T=260, N=2, K=1, H=128, V=64, dtype='bfloat16'),
]


@pytest.mark.parametrize('shape', SHAPES, ids=lambda x: case_id(**x))
def test_equals_reference_for_shape(shape):
  inputs = make_inputs(**shape)
  actual = run('pallas', inputs, block_sizes=BLOCKS, sink=True)
  expected = run('reference', inputs, sink=True)
  check(actual, expected, shape.get('dtype', 'float32'))


@pytest.mark.parametrize('case', CASES)
def test_equals_reference_for_option(case):
  inputs = make_inputs(T=T)
  actual = run('pallas', inputs, block_sizes=BLOCKS, **CASES[case])
  check(actual, run('reference', inputs, **CASES[case]))


@pytest.mark.parametrize(
  'options',
  [
    pytest.param(dict(), id='host'),
    pytest.param(dict(q_positions=shuffled(1, T)[0]), id='run-time'),
    pytest.param(dict(q_segment_ids=documents(2, T), rate=0.2), id='rows'),
  ],
)
def test_a_long_list_is_cut_into_calls(monkeypatch, options):
  # Of at most one row of blocks each.
  monkeypatch.setattr(work_lists, 'LONGEST', 3)
  work_lists._static_list.cache_clear()
  inputs = make_inputs(T=T)
  actual = run('pallas', inputs, block_sizes=BLOCKS, scale=0.3, **options)
  work_lists._static_list.cache_clear()
  check(actual, run('reference', inputs, scale=0.3, **options))


def unpacked(work):
  """(row, column, kind) of the entries that hold a pair."""
  found = []
  for call, (entries, count) in enumerate(
    zip(np.asarray(work.entries), np.asarray(work.count), strict=True)
  ):
    entries = entries[:count]
    rows = work_lists.row_of(entries)
    # Every row of a call is begun once and ended once, in order.
    first, last = (
      work_lists.is_first(entries),
      work_lists.is_last(entries),
    )
    np.testing.assert_array_equal(rows[first], np.arange(work.rows))
    np.testing.assert_array_equal(rows[last], np.arange(work.rows))
    kinds = work_lists.kind_of(entries)
    rows += call % work.chunks * work.rows
    entries = zip(rows, work_lists.column_of(entries), kinds, strict=True)
    found += [entry for entry in entries if entry[2] != masks.EMPTY]
  return found


@pytest.mark.parametrize('longest', [2**17, 9])
@pytest.mark.parametrize('by_column', [False, True])
@pytest.mark.parametrize('at_run_time', [False, True])
def test_list_has_the_blocks_of_the_mask(
  monkeypatch, at_run_time, by_column, longest
):
  monkeypatch.setattr(work_lists, 'LONGEST', longest)
  work_lists._static_list.cache_clear()
  mask = SlidingWindow(300) | masks.BlockSparse(512, ((1, 0), (0, 0), (1, 1)))
  tiling = make_tiling(
    mask, (1, 1100, 1000, 1, 1), BLOCKS, kind='', wide=False, backward=False
  )
  positions = jnp.arange(1100)[None] if at_run_time else None
  work = make_flat_list(
    mask, tiling, TokenIndices(positions), by_column=by_column
  )
  kinds = mask.block_map(1100, 1000, 128, 128)
  kinds[:, -1] = np.minimum(kinds[:, -1], masks.PARTIAL)
  kinds = kinds.T if by_column else kinds
  expected = [(*ij, kinds[ij]) for ij in zip(*np.nonzero(kinds), strict=True)]
  if at_run_time:
    # As exact as the bounds of the mask, which are not below it.
    assert {x[:2] for x in expected} <= {x[:2] for x in unpacked(work)}
  else:
    assert unpacked(work) == expected
  work_lists._static_list.cache_clear()


def loaded(mask, T, by_column=False):
  """(work list, tiling) with the blocks that a v5p would take."""
  tiling = make_tiling(
    mask,
    (1, T, T, 1, 1),
    BlockSizes(),
    kind='TPU v5',
    wide=False,
    backward=by_column,
  )
  work = make_flat_list(mask, tiling, TokenIndices(), by_column=by_column)
  return work, tiling


@pytest.mark.parametrize('by_column', [False, True])
def test_window_loads_the_blocks_it_needs(by_column):
  mask = SlidingWindow(1023)
  work, t = loaded(mask, 65_536, by_column)
  needed = np.count_nonzero(
    mask.block_map(65_536, 65_536, t.block_q, t.block_k)
  )
  assert work.count.sum() <= 1.25 * needed
  # Not by taking blocks so large that every pair needs them.
  pairs = mask.num_allowed(65_536, 65_536)
  assert work.count.sum() * t.block_q * t.block_k <= 1.6 * pairs


@pytest.mark.parametrize('by_column', [False, True])
def test_causal_mask_computes_half_of_the_full_one(by_column):
  work, t = loaded(Causal(), 65_536, by_column)
  area = work.count.sum() * t.block_q * t.block_k
  assert area <= 0.55 * 65_536**2


@pytest.mark.parametrize('mode', ['forward', 'reverse'])
def test_a_second_derivative_is_refused_by_name(mode):
  inputs = make_inputs(T=19)[:3]

  def loss(inputs):
    return dot_product_attention(*inputs, implementation='pallas').sum()

  with pytest.raises(NotImplementedError, match="implementation='xla'"):
    if mode == 'forward':
      jax.jvp(jax.grad(loss), (inputs,), (inputs,))
    else:
      jax.vjp(jax.grad(loss), inputs)


def test_parts_without_keys_merge_with_second_derivatives():
  lse = jnp.array([[[0.5, -jnp.inf, -jnp.inf]]])
  other = jnp.array([[[0.1, 0.2, -jnp.inf]]])
  out = jnp.ones((1, 1, 3, 2))

  def loss(scale):
    a, b = (
      jnp.where(x > -jnp.inf, jnp.maximum(x, 0) * scale, x)
      for x in (lse, other)
    )
    merged, total = merge(out * scale, a, 2 * out, b)
    return merged.sum() + jnp.where(total > -jnp.inf, total, 0).sum()

  for derivative in (jax.grad(loss), jax.hessian(loss)):
    assert jnp.isfinite(derivative(1.0))


TPU = Target('tpu', 'TPU v5')


def chosen(target, implementation=None, *, mask=None, sizes=None, **shape):
  q, k, v, *_ = make_inputs(**shape)
  args = resolve(q, k, v, mask=mask or Causal(), block_sizes=sizes)
  with compiling_for(target):
    return choose(implementation, q, k, v, args, uses_lse=False)


def test_a_tpu_takes_the_kernels_where_they_support_the_call():
  assert chosen(TPU) == 'pallas'
  assert chosen(TPU, 'xla') == 'xla'
  for other in (Target('cpu'), Target('gpu')):
    assert chosen(other) == 'xla'
  assert chosen(Target('tpu', 'TPU v4')) == 'xla'
  assert chosen(TPU, H=264) == 'xla'
  assert chosen(TPU, sizes=BlockSizes(block_q=16)) == 'xla'


LARGE = masks.BlockSparse(8, np.ones((200, 200), int))


@pytest.mark.parametrize(
  ('target', 'options', 'message'),
  [
    (Target('gpu'), dict(), 'TPUs'),
    (Target('tpu', 'TPU v4'), dict(), 'TPU v4'),
    (TPU, dict(H=264), 'H=264'),
    (TPU, dict(sizes=BlockSizes(block_k=64)), 'block_k=64'),
    (TPU, dict(mask=LARGE & Causal()), '200 x 200'),
    (TPU, dict(dtype='float16'), 'float16'),
  ],
)
def test_what_the_kernels_lack_is_refused_by_name(target, options, message):
  with pytest.raises(NotImplementedError, match=message):
    chosen(target, 'pallas', **options)


@pytest.mark.parametrize(
  'kind', ['TPU v5 lite', 'TPU v5', 'TPU v6 lite', 'new']
)
def test_blocks_fit_the_array_and_the_pieces(kind):
  for backward, wide in itertools.product((False, True), (False, True)):
    t = make_tiling(
      Causal(),
      (1, 4096, 300, 1, 1),
      BlockSizes(contiguous_len=768),
      kind=kind,
      wide=wide,
      backward=backward,
    )
    assert t.block_q in (128, 256) and t.block_k in (128, 256)
