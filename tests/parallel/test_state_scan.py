"""The scan over shards keeps the order, for numbers and for matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from longctx.parallel import state_scan
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.mesh import make_mesh
from tests.tolerances import tolerance


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('R', [1, 2, 3, 7, 8])
def test_exclusive_scan_keeps_the_order(R, reverse):
  # Products of matrices do not commute.
  matrices = np.random.default_rng(R).normal(size=(R, 2, 2))
  result = jax.jit(
    jax.shard_map(
      lambda x: state_scan.exclusive_scan(
        x, jnp.matmul, jnp.eye(2)[None], 'seq', reverse=reverse
      ),
      mesh=make_mesh(seq=R),
      in_specs=PartitionSpec('seq'),
      out_specs=PartitionSpec('seq'),
      check_vma=False,
    )
  )(jnp.asarray(matrices, jnp.float32))
  order = list(range(R))[:: -1 if reverse else 1]
  product = np.eye(2)
  for r in order:
    np.testing.assert_allclose(result[r], product, **tolerance('float32'))
    product = product @ matrices[r]


@pytest.mark.parametrize('name', ['contiguous', 'zigzag'])
def test_span_states_take_matrices_for_decays(name):
  # As in the delta rule: S' = decay S + state, with a decay per run, [2, 2].
  layout = SequenceLayout(name, 20, 5)
  count = layout.spans_per_shard * layout.num_shards
  rng = np.random.default_rng(0)
  decays, states = rng.normal(size=(2, count, 2, 2)) / 2
  begin = rng.normal(size=(2, 2))
  # The run that is at each place.
  order = layout.order[:: layout.span_len] // layout.span_len

  def combine(earlier, later):
    return later[0] @ earlier[0], later[0] @ earlier[1] + later[1]

  result = jax.jit(
    jax.shard_map(
      lambda begin, *elements: state_scan.span_states(
        begin[None],
        elements,
        combine,
        (jnp.eye(2)[None], jnp.zeros((1, 2, 2))),
        layout,
        'seq',
      ),
      mesh=make_mesh(seq=5),
      in_specs=(PartitionSpec(), *[PartitionSpec(None, 'seq')] * 2),
      out_specs=PartitionSpec(None, 'seq'),
      check_vma=False,
    )
  )(
    *(
      jnp.asarray(x, jnp.float32)
      for x in (begin, decays[order][None], states[order][None])
    )
  )
  for run in range(count):
    place = np.flatnonzero(order == run)[0]
    np.testing.assert_allclose(result[0, place], begin, **tolerance('float32'))
    begin = decays[run] @ begin + states[run]
