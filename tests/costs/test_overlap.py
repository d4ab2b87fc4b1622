"""What runs during a transfer is read from the order of instructions."""

import pytest

from longctx.costs.hlo import collective_bytes
from longctx.costs.overlap import grouped, transfers

# As libtpu writes it: a ring's loop around a kernel, a loop of unknown length,
# a permute that is waited for at once, one without a pair, an all-gather that
# goes on during a product, and an all-reduce of which a slice is kept.
PAIRS = 'channel_id=1, source_target_pairs={{0,1},{1,0}}'
GROUPS = 'channel_id=7, replica_groups={{0,1}}, dimensions={0}'
SCHEDULED = f"""HloModule jit_f, is_scheduled=true, num_partitions=2

%condition (q: (s32[], bf16[4,8])) -> pred[] {{
  %q = (s32[], bf16[4,8]{{1,0}}) parameter(0)
  %n = s32[]{{:T(128)}} constant(6)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}}

%until (q.1: (s32[], bf16[4,8])) -> pred[] {{
  %q.1 = (s32[], bf16[4,8]{{1,0}}) parameter(0)
  ROOT %some = pred[] custom-call(%q.1), custom_call_target="Some"
}}

%inner (r: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {{
  ROOT %r = (s32[], bf16[4,8]{{1,0}}) parameter(0)
}}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {{
  %p = (s32[], bf16[4,8]{{1,0}}) parameter(0)
  %x = bf16[4,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%p), index=1
  %hop-start = (bf16[4,8]{{1,0}}, bf16[4,8]{{1,0}}, u32[]{{:S(2)}}) \
collective-permute-start(%x), {PAIRS}, \
metadata={{op_name="jit(f)/jvp()/ppermute"}}
  %kernel = bf16[4,8]{{1,0}} custom-call(%x), \
custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(f)/jvp()/flash_forward/pallas_call"}}
  %w.1 = (s32[], bf16[4,8]{{1,0}}) while(%p), condition=%until, body=%inner
  %hop-done = bf16[4,8]{{1,0}} collective-permute-done(%hop-start)
  ROOT %t = (s32[], bf16[4,8]{{1,0}}) tuple(%x, %hop-done)
}}

%gather.1 (g: bf16[4,8]) -> bf16[8,8] {{
  %g = bf16[4,8]{{1,0}} parameter(0)
  ROOT %ag.1 = bf16[8,8]{{1,0}} all-gather(%g), {GROUPS}
}}

%async_collective_fusion.1 (h: bf16[4,8]) -> bf16[8,8] {{
  %h = bf16[4,8]{{1,0}} parameter(0)
  %product = bf16[8,8]{{1,0}} convolution(%h, %h), dim_labels=bf_io->bf
  ROOT %ag.2 = bf16[8,8]{{1,0}} all-gather(%h), {GROUPS}
}}

%gather.2 (k: bf16[4,8]) -> bf16[8,8] {{
  %k = bf16[4,8]{{1,0}} parameter(0)
  %ag.3 = bf16[8,8]{{1,0}} all-gather(%k), {GROUPS}
  ROOT %end = bf16[8,8]{{1,0}} custom-call(%ag.3), \
custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.2 (m: bf16[4,8]) -> bf16[2,8] {{
  %m = bf16[4,8]{{1,0}} parameter(0)
  %ar = bf16[4,8]{{1,0}} all-reduce(%m), \
replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %ds = bf16[2,8]{{1,0}} dynamic-slice(%ar), dynamic_slice_sizes={{2,8}}
}}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {{
  %a = bf16[4,8]{{1,0}} parameter(0)
  %w = (s32[], bf16[4,8]{{1,0}}) while(%a), condition=%condition, body=%body
  %halo-start = (bf16[4,8]{{1,0}}, bf16[4,8]{{1,0}}) \
collective-permute-start(%a), {PAIRS}, \
metadata={{op_name="jit(f)/transpose(jvp())/ppermute"}}
  %copy = bf16[4,8]{{1,0}} copy(%a)
  %halo-done = bf16[4,8]{{1,0}} collective-permute-done(%halo-start)
  %last = bf16[4,8]{{1,0}} collective-permute(%a), {PAIRS}, metadata=\
{{op_name="jit(f)/transpose(jvp())/checkpoint/rematted_computation/ppermute"}}
  %async-collective-start.3 = bf16[8,8]{{1,0}} fusion(%a), kind=kCustom, \
calls=%gather.1
  %step = bf16[8,8]{{1,0}} fusion(%a), kind=kOutput, \
calls=%async_collective_fusion.1, \
metadata={{op_name="jit(f)/jvp()/dot_general"}}
  %async-collective-done.3 = bf16[8,8]{{1,0}} fusion(%a), kind=kCustom, \
calls=%gather.2
  %rs = bf16[2,8]{{1,0}} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2
  ROOT %out = bf16[4,8]{{1,0}} copy(%a)
}}
"""
SHARD = 4 * 8 * 2


def test_overlap_is_what_takes_time_between_start_and_done():
  found = {transfer.name: transfer for transfer in transfers(SCHEDULED)}
  hop = found['hop-start']
  assert hop.between == ('kernel flash_forward', 'loop of a number of trips')
  assert (hop.times, hop.in_loop, hop.part) == (6, True, 'forward')
  assert (hop.operand_bytes, hop.wire_bytes) == (SHARD, 2 * SHARD)
  # A copy is no work, and a permute without a pair has nothing beside it.
  halo, last = found['halo-start'], found['last']
  assert halo.asynchronous and not halo.overlapped and halo.part == 'backward'
  assert not last.asynchronous and last.part == 'forward again'
  gather = found['async-collective-start.3']
  assert gather.between == ('product dot_general',)
  assert not found['rs'].asynchronous
  assert len(found) == 5


def test_what_several_instructions_name_is_sent_once():
  assert collective_bytes(SCHEDULED) == {
    'collective-permute': (6 + 2) * 2 * SHARD,
    'all-gather': 2 * SHARD,
    'all-to-all': 0,
    'reduce-scatter': SHARD,
    'all-reduce': 0,
  }


def test_groups_tell_loops_from_the_rest():
  groups = grouped(transfers(SCHEDULED))
  assert [(g.kind, g.part, g.in_loop, g.count) for g in groups] == [
    ('collective-permute', 'forward', True, 1),
    ('collective-permute', 'forward again', False, 1),
    ('collective-permute', 'backward', False, 1),
    ('all-gather', 'forward', False, 1),
    ('reduce-scatter', 'forward', False, 1),
  ]
  assert groups[0].overlapped == 1 and groups[1].asynchronous == 0


@pytest.mark.parametrize('name', ['start', 'done'])
def test_a_pair_is_found_by_its_operand(name):
  text = SCHEDULED.replace('%hop-start', '%hop.1').replace(
    'hop-done', f'other-{name}'
  )
  (hop,) = [t for t in transfers(text) if t.name == 'hop.1']
  assert hop.overlapped
