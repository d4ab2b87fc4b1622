"""A plan says what a step costs elsewhere, or in one line why it cannot."""

import dataclasses
import json
import subprocess
import sys

import pytest

from longctx import tasks
from longctx.cli import flags
from longctx.cli import plan as command
from longctx.costs import memory
from longctx.models.transformer import TransformerConfig
from longctx.plan import report, topologies
from longctx.plan.planner import make_plan
from longctx.training.config import (
  ExperimentConfig,
  ParallelConfig,
)
from tests import needs
from tests.training.test_trainer import ROOT

DEFAULT = f'--config={ROOT}/configs/default.py:passkey'


def small(**parallel) -> ExperimentConfig:
  """Two layers, a ring and a window, sharded parameters, on eight devices."""
  return ExperimentConfig(
    batch_size=2,
    task=tasks.task_defaults('passkey', seq_len=1024),
    model=TransformerConfig(
      layers=('sliding_window(window=64)', 'full'),
      d_model=128,
      num_heads=2,
      num_kv_heads=1,
      mlp_dim=256,
      dtype='bfloat16',
      remat='dots_no_batch',
    ),
    parallel=ParallelConfig(**dict(data=2, seq=4, fsdp=True) | parallel),
  )


@pytest.fixture(scope='module')
def plan():
  """Of eight v5e."""
  return make_plan(small(), 'v5e:2x4')


@needs.tpu_compiler
def test_plan_reads_memory_traffic_and_overlap_from_the_program(plan):
  assert plan.fits and plan.devices == 8 and plan.kind == 'TPU v5 lite'
  assert plan.hop_links == 1
  held = plan.memory
  # Two numbers of the optimizer for each parameter, and a count.
  assert 2 <= held.optimizer / held.parameters < 2.1
  assert held.parameters < 4 * plan.parameters
  assert held.temporaries > held.parameters
  assert plan.temporaries and 'buffer assignment' in plan.temporaries_from
  assert plan.wire_bytes['collective-permute'] > 0
  # The keys of the next hop are under way while a hop is computed.
  hops = [g for g in plan.collectives if g.in_loop]
  assert hops and all(g.overlapped == g.count for g in hops)
  window, full = plan.attention
  assert [ring.forward.hops for ring in window.rings] == [1, 1]
  (ring,) = full.rings
  assert ring.forward.hops == 3
  # A shard's keys and values, one head of 64, in two bytes.
  assert ring.forward.hop_bytes == 256 * 2 * 64 * 2
  assert ring.backward.hop_bytes == 3 * ring.forward.hop_bytes
  found = report.to_json(plan)
  json.dumps(found)
  assert {
    *('fits', 'memory', 'work', 'wire_bytes', 'collectives', 'attention'),
    *('estimate', 'temporaries', 'topology', 'mesh', 'seconds'),
  } <= set(found)
  assert found['memory']['total'] == held.total
  text = report.text(plan)
  for words in ('fits: ', 'largest temporaries', 'ratio', 'asynchronous'):
    assert words in text


@needs.tpu_compiler
def test_a_program_that_is_too_large_says_by_how_much(plan):
  small = dataclasses.replace(plan.memory, limit=2**20)
  assert report.verdict(dataclasses.replace(plan, memory=small)).endswith(
    'too much'
  )
  refused = dataclasses.replace(plan, refusal='RESOURCE_EXHAUSTED: no room')
  assert not refused.fits
  assert report.verdict(refused).startswith('does not fit: RESOURCE_EXHAUSTED')


ASSIGNED = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <59 reduce_min.20 @0> (size=512,offset=0): s32[]{:T(128)}
allocation 1: size 64, parameter 0, shape |f32[2,8]| at ShapeIndex {}:
 value: <7 p @0> (size=64,offset=0): f32[2,8]{1,0}
allocation 2: size 32, maybe-live-out:
 value: <8 dot @0> (size=32,offset=0): f32[8]{0}
allocation 3: size 1024, color 1, preallocated-temp:
 value: <9 copy.1 @1> (size=1024,offset=0): f32[256]{0:S(1)}
allocation 4: size 4096, preallocated-temp:
 value: <10 scores.1 @0> (size=2048,offset=0): f32[16,32]{1,0}
 value: <11 scores.2 @0> (size=2048,offset=2048): f32[16,32]{1,0}
 value: <12 while.3{1} (phi) @0> (size=128,offset=0): f32[32]{0}
"""
ALIVE = """HloLiveRange (max 9):
  BufferLiveRange:
    scores.1{}:1-4
  Live ranges at 3 (peak):
    scores.1{}: 2048 bytes (cumulative: 2048 bytes)
    scores.2{}: 2048 bytes (cumulative: 4096 bytes)
    copy.1{}: 1024 bytes (cumulative: 5120 bytes)
    while.3{1}: 128 bytes (cumulative: 5248 bytes)
    p{}: 64 bytes (cumulative: 5312 bytes)
"""
PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=2

FileNames
1 "/somewhere/longctx/models/transformer.py"
2 "/somewhere/flax/nnx.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=36 end_line=36}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (p: f32[2,8]) -> f32[8] {
  %p = f32[2,8]{1,0} parameter(0)
  %scores.1 = f32[16,32]{1,0} add(%p, %p), \
metadata={op_name="jit(f)/jvp()/add" stack_frame_id=2}
  %scores.2 = f32[16,32]{1,0} add(%p, %p), \
metadata={op_name="jit(f)/jvp()/add" stack_frame_id=2}
  ROOT %dot = f32[8]{0} dot(%scores.1, %scores.2)
}
"""


def test_largest_temporaries_are_those_alive_at_the_peak_in_hbm():
  found, how = memory.largest(PROGRAM, ASSIGNED, ALIVE)
  assert how == memory.FROM_ASSIGNMENT
  scores, state = found
  assert (scores.bytes, scores.count) == (4096, 2)
  assert scores.shape == 'f32[16,32]'
  # The nearest line of this library, not of those that it calls.
  assert scores.line == 'longctx/models/transformer.py:36'
  assert state.name == 'while.3' and state.bytes == 128
  assert memory.totals(ASSIGNED) == {
    'arguments': 64,
    'outputs': 32,
    'temporaries': 4608,
  }


def test_without_an_assignment_the_largest_results_are_listed():
  found, how = memory.largest(PROGRAM, '', '')
  assert how == memory.FROM_TEXT
  assert found[0].bytes == 2 * 2048


def planned(argv):
  """What the command does before it compiles, in this process."""
  with flags.before_compiling():
    command.prepare(flags.parse('plan', [f'--topology={argv[0]}', *argv[1:]]))


@needs.tpu_compiler
@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['v9:2x2', DEFAULT], "unknown topology 'v9:2x2': write generation:shape"),
    (['v5e', DEFAULT], "unknown topology 'v5e'"),
    (['v5e:3x5', DEFAULT], "the compiler knows no topology 'v5e:3x5'"),
    (
      ['v5e:2x4', DEFAULT, '--config.parallel.seq=4'],
      'has 8 devices, and the mesh data=1 x seq=4 x model=1 has 4: take '
      '--config.parallel.data=1 --config.parallel.seq=8',
    ),
    (
      ['v5e:2x4', DEFAULT, '--config.parallel.seq=8', '--config.batch_size=0'],
      'batch_size=0 must be at least 1',
    ),
    (
      ['v5e:2x4', DEFAULT, '--config.parallel.data=8', '--config.batch_size=2'],
      'batch_size=2 must be a multiple of parallel.data=8',
    ),
    (
      ['v5e:2x4', DEFAULT, '--config.parallel.model=8'],
      'query_heads=4 must be a multiple of the mesh axis model=8',
    ),
    (
      [
        *('v5e:2x4', DEFAULT, '--config.parallel.seq=8'),
        *('--config.model.layers=linear', '--config.parallel.layout=striped'),
      ],
      "LinearAttention lacks 'striped'",
    ),
    (
      ['v5e:2x4', f'--config={ROOT}/configs/quickstart.py'],
      'take one of --run=',
    ),
  ],
)
def test_what_cannot_be_planned_is_one_line(argv, message, capsys):
  with pytest.raises(SystemExit) as stop:
    planned(argv)
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error


@pytest.mark.parametrize(
  ('topology', 'message'),
  [('v5e:2x4', "pip install -e '.[tpu]'"), ('h100:8', "'.[cuda]'")],
)
def test_a_compiler_that_is_not_installed_is_named(
  topology, message, monkeypatch
):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match='needs the') as error:
    topologies.describe(topology)
  assert message in str(error.value)


def test_meshes_fill_the_devices_and_divide_batch_and_heads():
  found = topologies.meshes(16, batch=2, heads=2)
  assert found[0] == (1, 16, 1)
  assert set(found) == {(1, 16, 1), (2, 8, 1), (1, 8, 2), (2, 4, 2)}


def test_command_without_a_topology_ends_in_one_line():
  done = subprocess.run(
    [sys.executable, '-m', 'longctx.plan', DEFAULT],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith('error: --topology=GENERATION:SHAPE is missing')
