"""A layout loses no token, and keeps the arrays of a batch together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.parallel.layout import LAYOUTS, SequenceLayout

# Lengths that divide, that do not, that leave shards without any token, and
# that are long enough for zigzag chunks to be rounded.
SIZES = [(1, 1), (7, 1), (16, 4), (17, 4), (3, 8), (64, 3), (67, 8), (5000, 4)]

every_layout = pytest.mark.parametrize('name', LAYOUTS)
every_size = pytest.mark.parametrize(('T', 'R'), SIZES)


def test_orders_are_those_of_the_docstring():
  drawn = {
    'contiguous': '0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15',
    'zigzag': '0 1 14 15 | 2 3 12 13 | 4 5 10 11 | 6 7 8 9',
    'striped': '0 4 8 12 | 1 5 9 13 | 2 6 10 14 | 3 7 11 15',
  }
  for name, text in drawn.items():
    layout = SequenceLayout(name, 16, 4)
    assert layout.order.tolist() == [int(t) for t in text.split() if t != '|']


@every_layout
@every_size
def test_order_is_a_permutation_that_places_invert(name, T, R):
  layout = SequenceLayout(name, T, R)
  every = np.arange(layout.padded_len)
  assert layout.padded_len == R * layout.shard_len >= T
  np.testing.assert_array_equal(np.sort(layout.order), every)
  np.testing.assert_array_equal(layout.order[layout.places], every)
  assert not layout.is_natural or (layout.order == every).all()
  assert layout.is_padded == (layout.padded_len > T)


@every_layout
@every_size
def test_padding_is_less_than_a_run_per_shard(name, T, R):
  layout = SequenceLayout(name, T, R)
  runs = max(layout.spans_per_shard, 1) * R
  multiple = 128 if name == 'zigzag' and layout.span_len > 128 else 1
  assert layout.padded_len - T < runs * multiple


@every_layout
@every_size
def test_traced_positions_are_those_of_integers(name, T, R):
  layout = SequenceLayout(name, T, R)
  traced = jax.jit(jax.vmap(layout.positions))(jnp.arange(R))
  counted = np.stack([layout.positions(shard) for shard in range(R)])
  assert traced.dtype == counted.dtype == np.int32
  np.testing.assert_array_equal(traced, counted)


@every_layout
@every_size
@pytest.mark.parametrize('xp', [np, jnp], ids=['numpy', 'jax'])
def test_restore_inverts_apply(name, T, R, xp):
  layout = SequenceLayout(name, T, R)
  x = xp.asarray(np.random.default_rng(0).normal(size=(2, T, 3)))
  placed = layout.apply(x, fill=-1)
  assert type(placed) is type(x)
  assert placed.shape == (2, layout.padded_len, 3)
  np.testing.assert_array_equal(placed[:, layout.places[:T]], x)
  assert (placed[:, layout.places[T:]] == -1).all()
  np.testing.assert_array_equal(layout.restore(placed), x)
  other = layout.apply(x.swapaxes(0, 1), axis=0, fill=-1)
  np.testing.assert_array_equal(other.swapaxes(0, 1), placed)
  np.testing.assert_array_equal(layout.restore(other, axis=0), x.swapaxes(0, 1))


def make_batch(B=2, T=19):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 50, (B, T + 1))
  return dict(
    tokens=tokens[:, :-1],
    labels=tokens[:, 1:],
    weights=np.ones((B, T), np.float32),
    segment_ids=np.sort(rng.integers(0, 3, (B, T)), axis=1),
    relevant=rng.random((B, T)) < 0.5,
  )


@every_layout
@pytest.mark.parametrize('R', [1, 4])
def test_a_batch_stays_aligned(name, R):
  batch = make_batch()
  B, T = batch['tokens'].shape
  batch['positions'] = np.tile(np.arange(T)[::-1], (B, 1))
  indices = np.array([[0, 5, T - 1, -1], [18, 3, -1, -1]])
  layout = SequenceLayout(name, T, R)
  placed = layout.place({**batch, 'query_indices': indices})
  assert set(placed) == {*batch, 'query_indices'}
  for name, x in batch.items():
    assert placed[name].shape == (B, layout.padded_len)
    assert placed[name].dtype == x.dtype
    np.testing.assert_array_equal(layout.restore(placed[name]), x)
  at = np.where(indices < 0, 0, placed['query_indices'])
  np.testing.assert_array_equal(placed['query_indices'] < 0, indices < 0)
  for name in batch:
    there = np.take_along_axis(placed[name], at, axis=1)
    expected = np.take_along_axis(batch[name], np.maximum(indices, 0), axis=1)
    np.testing.assert_array_equal(there[indices >= 0], expected[indices >= 0])


@every_layout
def test_padding_of_a_batch_weighs_nothing_and_is_read_by_nobody(name):
  batch = make_batch()
  B, T = batch['tokens'].shape
  layout = SequenceLayout(name, T, 8)
  padding = layout.order >= T
  assert padding.any()
  placed = layout.place(batch)
  assert (placed['weights'][:, padding] == 0).all()
  assert placed['weights'].sum() == B * T
  assert not placed['relevant'][:, padding].any()
  tokens = placed['segment_ids'][:, ~padding]
  assert not np.isin(placed['segment_ids'][:, padding], tokens).any()
  # With positions of its own and no segments, padding needs a segment.
  del batch['segment_ids']
  assert 'segment_ids' not in layout.place(batch)
  batch['positions'] = np.tile(np.arange(T)[::-1], (B, 1))
  ids = layout.place(batch)['segment_ids']
  assert (ids[:, padding] == 1).all() and (ids[:, ~padding] == 0).all()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: SequenceLayout('zigzig', 8, 2), 'known: contiguous, zigzag'),
    (lambda: SequenceLayout('zigzag', 0, 2), 'seq_len=0'),
    (lambda: SequenceLayout('zigzag', 8, 0), 'num_shards=0'),
    (
      lambda: SequenceLayout('zigzag', 8, 2).apply(np.zeros((1, 7))),
      'seq_len=8',
    ),
    (
      lambda: SequenceLayout('zigzag', 7, 2).restore(np.zeros((1, 7))),
      'padded_len=8',
    ),
    (
      lambda: SequenceLayout('zigzag', 8, 2).place(
        dict(images=np.zeros((1, 8)))
      ),
      "no layout for .'images'.",
    ),
  ],
)
def test_a_wrong_call_says_what_to_change(call, message):
  with pytest.raises(ValueError, match=message):
    call()
