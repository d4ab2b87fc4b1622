"""Tokens come into a layout's order, and out of it, wherever they were made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.attention.context import Context
from longctx.parallel import Placement
from longctx.parallel.layout import LAYOUTS, SequenceLayout
from longctx.parallel.mesh import make_mesh

every_layout = pytest.mark.parametrize('name', LAYOUTS)


def reverse_second_halves(x):
  """The zigzag layout of two shards, by the reversal of an array."""
  x = jnp.moveaxis(x.reshape(2, 2, 2, 4), 1, 0)
  return jnp.stack([x[0], jnp.flip(x[1], 1)], 2).reshape(2, 16)


@pytest.mark.xfail(
  strict=True,
  reason='the SPMD partitioner of XLA loses the reversal of an array that is '
  'the same on all rows; once it does not, layouts need no gather',
)
def test_the_compiler_spreads_a_reversal_of_equal_rows():
  def run():
    return reverse_second_halves(jnp.broadcast_to(jnp.arange(16), (2, 16)))

  sharding = NamedSharding(make_mesh(data=2, seq=2), P('data', 'seq'))
  spread = jax.jit(run, out_shardings=sharding)
  np.testing.assert_array_equal(spread(), run())


def sources(row, B, sharding):
  """(arguments, what makes an array of B equal rows of them) by name."""
  x = np.broadcast_to(row, (B, len(row)))
  spread = lambda row: jnp.broadcast_to(row, x.shape)
  return {
    'argument': ((x,), lambda x: x),
    'constant': ((), lambda: jnp.asarray(x)),
    'broadcast': ((row,), spread),
    'sharded': ((jax.device_put(row, sharding),), spread),
    'made': ((), lambda: spread(jnp.arange(len(row)))),
  }


# Axes data and seq, with one row for each device of data.
@every_layout
@pytest.mark.parametrize(
  ('axes', 'T'),
  [((2, 2), 16), ((2, 4), 48), ((4, 2), 13), ((1, 8), 48), ((2, 3), 13)],
  ids=str,
)
def test_a_program_reorders_what_it_is_given_and_what_it_makes(axes, T, name):
  data, seq = axes
  layout = SequenceLayout(name, T, seq)
  place = Placement(make_mesh(data, seq), layout, 'ring')
  row = np.arange(T)
  natural = np.broadcast_to(row, (data, T))
  placed = layout.apply(natural, fill=-1)
  along = NamedSharding(place.mesh, P('seq' if T % seq == 0 else None))
  for how, (arguments, make) in sources(row, data, along).items():

    @jax.jit
    def run(*arguments, make=make):
      x = make(*arguments)
      there = place.into_layout(x, fill=-1)
      # What a caller's own program may do with a layout.
      own = jax.lax.with_sharding_constraint(
        layout.apply(x, fill=-1), place.sharding
      )
      return there, place.into_natural(there), own, layout.restore(own)

    for found, wanted in zip(
      run(*arguments), (placed, natural) * 2, strict=True
    ):
      np.testing.assert_array_equal(found, wanted, err_msg=how)
  # Of which padding alone is to be told apart.
  ones = jax.jit(lambda: place.into_layout(jnp.ones((data, T))))()
  np.testing.assert_array_equal(ones, placed >= 0)


@every_layout
def test_reordering_back_is_the_gradient(name):
  layout = SequenceLayout(name, 13, 4)
  place = Placement(make_mesh(2, 4), layout, 'ring')
  rng = np.random.default_rng(0)
  x, bar = rng.normal(size=(2, 2, 13, 3))
  bar_there = layout.apply(bar, fill=7.0)
  _, vjp = jax.vjp(place.into_layout, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(
    vjp(jnp.asarray(bar_there, jnp.float32))[0], bar, rtol=1e-6
  )


@every_layout
def test_documents_are_counted_alike_on_a_mesh(name):
  ids = np.array([[4] * 5 + [2] + [7] * 7, [1, 1, 0, 0, 0, 1, 1] + [3] * 6])
  expected = Context(segment_ids=jnp.asarray(ids)).true_positions(13)
  layout = SequenceLayout(name, 13, 4)
  place = Placement(make_mesh(2, 4), layout, 'ring')

  def positions(ids):
    context = Context(segment_ids=ids, placement=place)
    return context.counted(layout.padded_len).true_positions(layout.padded_len)

  placed = jnp.asarray(layout.apply(ids, fill=9))
  for found in (
    jax.jit(positions)(placed),
    jax.jit(lambda: positions(placed))(),
  ):
    np.testing.assert_array_equal(layout.restore(found), expected)
