"""Counts and sums within documents, in any order of the tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.attention.context import Context
from longctx.masks import Causal, PrefixColumns
from longctx.parallel import Placement, make_mesh
from longctx.parallel.layout import LAYOUTS, SequenceLayout
from tests.tolerances import tolerance

T = 13
X = np.random.default_rng(0).normal(size=(2, T, 3)).astype(np.float32)
# A document of one token, one that ends in a run, an id that comes back.
SEGMENTS = np.array([[4] * 5 + [2] + [7] * 7, [1, 1, 0, 0, 0, 1, 1] + [3] * 6])


def sums(x, segment_ids):
  out = np.zeros_like(x)
  for row in range(len(x)):
    for i in range(T):
      earlier = np.arange(T) <= i
      if segment_ids is not None:
        earlier &= segment_ids[row] == segment_ids[row, i]
      out[row, i] = x[row][earlier].sum(0)
  return out


@pytest.mark.parametrize('packed', [False, True], ids=['alone', 'packed'])
@pytest.mark.parametrize('order', ['natural', 'shuffled', *LAYOUTS])
def test_cumulative_sum_is_that_of_the_document_in_any_order(order, packed):
  ids = SEGMENTS if packed else None
  expected = sums(X, ids)
  if order == 'natural':
    context = Context(segment_ids=None if ids is None else jnp.asarray(ids))
    found = context.cumulative_sum(jnp.asarray(X))
  elif order == 'shuffled':
    places = np.random.default_rng(1).permutation(T)
    context = Context(
      positions=jnp.asarray(places),
      segment_ids=None if ids is None else jnp.asarray(ids[:, places]),
    )
    found = context.cumulative_sum(jnp.asarray(X[:, places]))
    expected = expected[:, places]
  else:
    layout = SequenceLayout(order, T, 2)
    placement = Placement(make_mesh(seq=2), layout, 'ring')
    if packed:
      ids = jnp.asarray(layout.apply(ids, fill=9))
    context = Context(placement=placement, segment_ids=ids)
    found = context.cumulative_sum(jnp.asarray(layout.apply(X)))
    found = layout.restore(found)
  np.testing.assert_allclose(found, expected, **tolerance('float32'))


def test_positions_start_anew_in_each_document():
  context = Context(segment_ids=jnp.asarray(SEGMENTS[:1]))
  expected = [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6]]
  for found in (context, context.counted(T)):
    np.testing.assert_array_equal(found.segment_positions(T), expected)
    np.testing.assert_array_equal(found.true_positions(T), expected)
  np.testing.assert_array_equal(context.natural_positions(T), np.arange(T))
  np.testing.assert_array_equal(Context().segment_positions(T), np.arange(T))


def test_given_positions_and_other_documents_are_counted_anew():
  context = Context(segment_ids=jnp.asarray(SEGMENTS[:1])).counted(T)
  given = context.replace(positions=jnp.arange(T)[None] + 3)
  np.testing.assert_array_equal(given.true_positions(T)[0], np.arange(T) + 3)
  expected = [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6]]
  np.testing.assert_array_equal(given.segment_positions(T), expected)
  one = context.replace(segment_ids=None)
  np.testing.assert_array_equal(one.true_positions(T), np.arange(T))


@pytest.mark.parametrize('implementation', [None, 'reference'])
def test_the_first_tokens_of_a_mask_are_those_of_each_document(implementation):
  rng = np.random.default_rng(1)
  q, k, v = (jnp.asarray(rng.normal(size=(1, T, 1, 4))) for _ in 'qkv')
  mask = Causal() & PrefixColumns(2)
  packed = Context(
    segment_ids=jnp.asarray(SEGMENTS[:1]), implementation=implementation
  )
  found = packed.dot_product_attention(q, k, v, mask=mask)
  alone = Context(implementation=implementation)
  parts = [
    alone.dot_product_attention(*(x[:, a:b] for x in (q, k, v)), mask=mask)
    for a, b in ((0, 5), (5, 6), (6, T))
  ]
  np.testing.assert_allclose(
    found, jnp.concatenate(parts, 1), **tolerance('float32')
  )
