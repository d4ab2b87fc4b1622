"""A ring's hops cross one link, without which a v5e does not overlap them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import parallel
from longctx.costs.overlap import transfers
from longctx.parallel.layout import SequenceLayout
from longctx.plan import topologies
from tests import needs

pytestmark = needs.tpu_compiler


@pytest.mark.parametrize(
  ('topology', 'mesh'),
  [
    ('v5e:2x4', (1, 8, 1)),
    ('v5e:4x8', (1, 32, 1)),
    ('v5e:16x16', (4, 64, 1)),
    ('v5e:16x16', (16, 16, 1)),
    ('v5p:4x4x8', (4, 32, 1)),
    ('v5p:4x4x8', (2, 32, 2)),
    ('v5p:8x16x16', (4, 512, 1)),
    ('v6e:16x16', (1, 256, 1)),
    ('tpu7x:4x4x4', (4, 32, 1)),
  ],
)
def test_neighbours_on_seq_are_one_link_apart(topology, mesh):
  devices = parallel.topology_mesh(topologies.describe(topology), *mesh).devices
  wraps = topologies.find_chip(topology).wraps
  assert devices.shape == mesh
  assert topologies.longest_hop(devices, wraps=wraps, axis=1) == 1


def test_a_ring_of_32_v5e_sends_while_it_computes():
  mesh = parallel.topology_mesh(topologies.describe('v5e:4x8'), 1, 32, 1)
  layout = SequenceLayout('zigzag', 32 * 256, 32)
  q = jax.ShapeDtypeStruct(
    (1, layout.padded_len, 2, 128),
    jnp.bfloat16,
    sharding=NamedSharding(mesh, P(None, 'seq')),
  )

  def attend(q, k, v):
    return parallel.dot_product_attention(
      q, k, v, mesh=mesh, layout=layout, in_layout=True
    )

  text = jax.jit(attend).lower(q, q, q).compile().as_text()
  found = transfers(text)
  assert len(found) == 4
  assert all(hop.asynchronous and hop.overlapped for hop in found)
