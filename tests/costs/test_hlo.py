"""The counter of bytes on the wire reads what small programs must send."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from longctx.costs.hlo import KINDS, collective_bytes
from longctx.parallel.mesh import make_mesh

RING = [(i, (i + 1) % 4) for i in range(4)]
SHARD = 5 * 12 * 4


def sent(body):
  """What `body` sends of a shard float32[5, 12] on each of 2 x 4 devices."""
  mesh = make_mesh(data=2, seq=4)
  spec = PartitionSpec(('data', 'seq'))
  program = jax.shard_map(
    body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  x = jax.ShapeDtypeStruct((40, 12), jnp.float32)
  text = jax.jit(program).lower(x).compile().as_text()
  counted = collective_bytes(text)
  assert set(counted) == set(KINDS)
  return {kind: size for kind, size in counted.items() if size}


def hop(x, ring=RING):
  return jax.lax.ppermute(x, 'seq', ring)


def loop(body, x, length):
  return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=length)[0]


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    pytest.param(jnp.sin, {}, id='nothing'),
    pytest.param(hop, {'collective-permute': 8 * SHARD}, id='permute'),
    pytest.param(
      lambda x: hop(x, [(0, 0), (1, 2), (2, 3)]),
      {'collective-permute': 4 * SHARD},
      id='permute-open',
    ),
    pytest.param(
      lambda x: jax.lax.all_gather(x, 'seq').sum(0),
      {'all-gather': 8 * 3 * SHARD},
      id='all-gather',
    ),
    pytest.param(
      lambda x: jax.lax.all_to_all(x, 'seq', 1, 0, tiled=True),
      {'all-to-all': 8 * SHARD * 3 // 4},
      id='all-to-all',
    ),
    pytest.param(
      lambda x: jax.lax.psum_scatter(
        x, 'data', scatter_dimension=1, tiled=True
      ),
      {'reduce-scatter': 8 * SHARD // 2},
      id='reduce-scatter',
    ),
    pytest.param(
      lambda x: jax.lax.psum(x, ('data', 'seq')),
      {'all-reduce': 8 * SHARD * 2 * 7 // 8},
      id='all-reduce',
    ),
    pytest.param(
      lambda x: loop(lambda x: jnp.sin(hop(x)), x, 7),
      {'collective-permute': 7 * 8 * SHARD},
      id='scan',
    ),
    pytest.param(
      lambda x: jax.lax.fori_loop(
        0,
        5,
        lambda i, x: loop(
          lambda x: jnp.sin(hop(x)), x + jax.lax.pmax(x, 'data'), 3
        ),
        x,
      ),
      {'collective-permute': 5 * 3 * 8 * SHARD, 'all-reduce': 5 * 8 * SHARD},
      id='nested-loops',
    ),
    pytest.param(
      lambda x: jax.lax.cond(
        jax.lax.psum(x, ('data', 'seq')).sum() > 0, hop, jnp.sin, x
      ),
      {
        'collective-permute': 8 * SHARD,
        'all-reduce': 8 * SHARD * 2 * 7 // 8,
      },
      id='cond',
    ),
  ],
)
def test_counted_bytes_are_those_of_the_program(body, expected):
  assert sent(body) == expected


def test_loop_of_unknown_length_is_refused():
  with pytest.raises(ValueError, match='no known number of trips'):
    sent(
      lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: hop(x), x)
    )


# What other compilers write: asynchronous pairs, tiled layouts, groups as a
# list, a product or axes of a mesh, and no trip count.
WRITTEN = """HloModule jit_f, replica_count=1, num_partitions=8

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %s = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
  %d = bf16[4,8]{1,0:T(8,128)(2,1)} collective-permute-done(%s)
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%i, %d)
}

%condition (q: (s32[], bf16[4,8])) -> pred[] {
  %q = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[] constant(6)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

%scatter (r: f32[8,4]) -> f32[2,4] {
  %r = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%r), replica_groups=[2,4]<=[8], \
dimensions={0}, to_apply=%sum
}

ENTRY %main (a: bf16[4,8], b: f32[8,4]) -> (bf16[4,8], f32[2,4]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[4,8]{1,0}) tuple(%zero, %a)
  %w = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %y = bf16[4,8]{1,0} get-tuple-element(%w), index=1
  %as = ((f32[8,4]), f32[2,4]{1,0}) async-start(%b), calls=%scatter
  %ad = f32[2,4]{1,0} async-done(%as), calls=%scatter
  %gs = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%y), channel_id=2, \
replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %gd = bf16[8,8]{1,0} all-gather-done(%gs)
  %ar = (f32[2,4], pred[4]) all-reduce(%ad, %mask), to_apply=%sum, \
replica_groups=mesh['data'=2,'seq'=4] {'data','seq':(1)2}
  %mask = pred[4]{0} constant({1,0,1,0})
  %all = f32[2,4]{1,0} all-reduce(%ad), replica_groups={}, to_apply=%sum
  %a2a = f32[2,4]{1,0} all-to-all(%ad), replica_groups={{0,4},{1,5}}
  ROOT %out = (bf16[4,8]{1,0}, f32[2,4]{1,0}) tuple(%y, %ad)
}
"""


def test_counter_reads_what_other_compilers_write():
  assert collective_bytes(WRITTEN) == {
    'collective-permute': 6 * 2 * 64,
    'all-gather': 8 * 64,
    'all-to-all': 2 * 32,
    'reduce-scatter': 2 * 3 * 128,
    'all-reduce': 2 * 2 * 3 * (32 + 4) + 2 * 7 * 32,
  }
  with pytest.raises(NotImplementedError, match='ragged-all-to-all'):
    collective_bytes(WRITTEN.replace('all-to-all', 'ragged-all-to-all'))
  with pytest.raises(ValueError, match='no ENTRY computation'):
    collective_bytes('module @jit_f {}')
