"""Masks: block maps and counts against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import masks

small = st.integers(1, 9)
primitive = st.one_of(
  st.just(masks.Full()),
  st.just(masks.Causal()),
  st.builds(masks.SlidingWindow, st.integers(0, 20), st.integers(0, 9)),
  st.builds(masks.Dilated, small, small),
  st.builds(masks.PrefixColumns, st.integers(0, 40)),
  st.builds(masks.PrefixRows, st.integers(0, 40)),
  st.builds(masks.GlobalTokens, st.integers(0, 40)),
  st.builds(
    masks.RandomBlocks,
    small,
    st.integers(1, 4),
    st.integers(0, 99),
    st.one_of(st.none(), st.integers(1, 12)),
  ),
  st.builds(
    lambda block, rows, columns, seed: masks.BlockSparse(
      block, np.random.default_rng(seed).integers(0, 2, (rows, columns))
    ),
    small,
    small,
    small,
    st.integers(0, 99),
  ),
)
any_mask = st.recursive(
  primitive,
  lambda inner: st.one_of(
    st.builds(masks.And, inner, inner), st.builds(masks.Or, inner, inner)
  ),
  max_leaves=4,
)
EXAMPLES = [
  masks.Full(),
  masks.Causal(),
  masks.SlidingWindow(5, 2),
  masks.Dilated(4, 3) & masks.Causal(),
  masks.PrefixColumns(4) & masks.Causal() | masks.SlidingWindow(7),
  masks.GlobalTokens(3) | masks.SlidingWindow(6, 6),
  masks.PrefixRows(3) | masks.SlidingWindow(6, 6) & masks.Beyond(3, 2),
  masks.RandomBlocks(8, 2, seed=1),
  masks.RandomBlocks(8, 3, seed=2, num_blocks=9),
  masks.BlockSparse(16, ((1, 0), (1, 1))),
]


def dense_block_map(dense, block_q, block_k):
  T, S = dense.shape
  rows = []
  for q in range(0, T, block_q):
    row = []
    for k in range(0, S, block_k):
      block = dense[q : q + block_q, k : k + block_k]
      row.append(2 if block.all() else int(block.any()))
    rows.append(row)
  return np.array(rows, np.int8)


@settings(max_examples=200)
@given(any_mask, st.integers(1, 70), st.integers(1, 70), small, small)
def test_block_map_equals_dense(mask, T, S, block_q, block_k):
  dense = mask.dense(T, S)
  expected = dense_block_map(dense, block_q, block_k)
  block_map = mask.block_map(T, S, block_q, block_k)
  assert block_map.dtype == np.int8
  np.testing.assert_array_equal(block_map, expected)
  assert mask.num_allowed(T, S) == dense.sum()


@settings(max_examples=200)
@given(any_mask, small, small, st.integers(0, 999))
def test_bounds_never_miss_a_pair(mask, block_q, block_k, seed):
  rng = np.random.default_rng(seed)
  q, k = (rng.integers(0, 50, (8, b)) for b in (block_q, block_k))
  allowed = mask.allowed(q[:, None, :, None], k[None, :, None, :])
  allowed = np.broadcast_to(allowed, (8, 8, block_q, block_k))
  some, everything = mask.bounds(
    masks.Range(q.min(1)[:, None], q.max(1)[:, None]),
    masks.Range(k.min(1)[None], k.max(1)[None]),
  )
  assert not (allowed.any((2, 3)) & ~some).any()
  assert not (everything & ~allowed.all((2, 3))).any()


@settings(max_examples=200)
@given(any_mask, st.integers(1, 60))
def test_no_earlier_key_beyond_the_retention_is_read(mask, length):
  dense = mask.dense(length, length)
  columns, window = mask.kv_retention()
  q, k = np.tril_indices(length)
  kept = (k < columns) | (window is None or q - k < window)
  assert not (dense[q, k] & ~kept).any()
  if mask.is_causal:
    assert not dense[np.triu_indices(length, 1)].any()


@pytest.mark.parametrize('mask', EXAMPLES, ids=str)
def test_allowed_is_the_same_in_numpy_and_jax(mask):
  q, k = np.arange(64)[:, None], np.arange(64)[None, :]
  on_device = jax.jit(mask.allowed)(jnp.asarray(q), jnp.asarray(k))
  assert on_device.dtype == bool
  np.testing.assert_array_equal(on_device, mask.allowed(q, k))
  np.testing.assert_array_equal(on_device, mask.dense(64, 64))


@pytest.mark.parametrize('mask', EXAMPLES, ids=str)
def test_masks_are_hashable_and_compare_by_value(mask):
  assert hash(mask) == hash(eval(repr(mask), vars(masks)))
  assert mask == eval(repr(mask), vars(masks))


def test_sinks_and_window_keep_their_slots():
  mask = masks.SlidingWindow(1023) | (masks.PrefixColumns(4) & masks.Causal())
  assert mask.is_causal
  kept = mask.kv_retention()
  assert kept == (4, 1024)
  assert kept.slots(65536) == kept.slots(None) == 1028
  assert kept.slots(512) == 512
  assert masks.Causal().kv_retention().slots(1000) == 1000
  with pytest.raises(ValueError, match='give a capacity'):
    masks.Causal().kv_retention().slots(None)


def test_block_map_of_a_million_tokens_is_made_from_offsets():
  T = 1 << 20
  window = masks.SlidingWindow(4095)
  blocks = window.block_map(T, T, 512, 512)
  # Nine blocks a row in the middle: seven full, one cut at either end.
  assert np.bincount(blocks[1000], minlength=3).tolist() == [2039, 2, 7]
  assert window.num_allowed(T, T) == 4096 * T - 4096 * 4095 // 2
  assert masks.Causal().num_allowed(T, T) == T * (T + 1) // 2


def test_random_blocks_draw_without_repetition():
  mask = masks.RandomBlocks(1, 3, seed=5, num_blocks=50)
  per_row = mask.dense(200, 50).sum(1)
  assert (per_row == 3).all()
  causal = masks.RandomBlocks(1, 3, seed=5).dense(100, 100)
  np.testing.assert_array_equal(
    causal.sum(1), np.minimum(np.arange(100) + 1, 3)
  )
  assert not causal[np.triu_indices(100, 1)].any()


def test_useful_flops_count_allowed_pairs():
  T, H = 64, 16
  assert masks.Full().useful_flops(T, T, H) == 4 * H * T * T
  assert masks.Causal().useful_flops(T, T, H) == 2 * H * T * (T + 1)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: masks.SlidingWindow(-1), 'left=-1 must be at least 0'),
    (lambda: masks.Dilated(0, 1), 'window=0 must be at least 1'),
    (lambda: masks.PrefixColumns(-2), 'n=-2 must be at least 0'),
    (lambda: masks.RandomBlocks(8, 0, 1), 'per_row=0 must be at least 1'),
    (lambda: masks.BlockSparse(8, ((0, 2),)), 'matrix of 0 and 1'),
    (lambda: masks.Causal().block_map(8, 8, 0, 4), 'block=0'),
  ],
)
def test_wrong_arguments_are_named(build, message):
  with pytest.raises(ValueError, match=message):
    build()
