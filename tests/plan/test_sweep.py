"""A sweep compiles the nearest choices and ranks what it found."""

from types import SimpleNamespace

from longctx import tasks
from longctx.models.transformer import TransformerConfig
from longctx.plan import hops, plot
from longctx.plan.planner import Estimate, Memory, Plan, StepFlops
from longctx.plan.sweep import (
  Choice,
  Entry,
  choices,
  ranked,
  sweep,
  table,
  with_choice,
)
from longctx.training.config import ExperimentConfig, ParallelConfig

CONFIG = ExperimentConfig(
  batch_size=2,
  task=tasks.task_defaults('passkey'),
  model=TransformerConfig(num_heads=4, num_kv_heads=2, remat='dots'),
  parallel=ParallelConfig(data=2, seq=4, layout='striped'),
)


def entry(layout, **found):
  return Entry(Choice('ring', layout, 'none', (1, 8, 1)), **found)


def test_what_fits_comes_first_then_time_then_memory():
  best = entry('zigzag', fits=True, seconds=1.0, bytes=5)
  large = entry('striped', fits=True, seconds=1.0, bytes=6)
  slow = entry('contiguous', fits=True, seconds=2.0, bytes=1)
  too_large = entry('zigzag', fits=False, seconds=0.1, bytes=9)
  refused = entry('zigzag', refusal='no')
  entries = [refused, too_large, slow, large, best]
  assert ranked(entries) == [best, large, slow, too_large, refused]
  lines = list(table(ranked(entries), 3))
  assert lines[1].endswith('GiB') and ' fits ' in lines[1]
  assert 'too large' in lines[4]
  assert lines[-2:] == ['1 refused: no', '3 left out: --most compiles more']


def test_the_config_itself_is_tried_first_and_every_mesh_fits():
  found = choices(CONFIG, 8)
  assert found[0] == Choice('ring', 'striped', 'dots', (2, 4, 1))
  assert len(set(found)) == len(found)
  for choice in found:
    data, seq, model = choice.mesh
    assert data * seq * model == 8 and 2 % data == 0 and 4 % model == 0
    changed = with_choice(CONFIG, choice)
    assert changed.parallel.devices == 8 and changed.model.remat == choice.remat
  both = [c for c in found if c.scheme == 'ring+ulysses']
  assert both and all(c.mesh[2] > 1 for c in both)


def test_sweep_stops_at_its_bound_and_asks_once_for_each_refusal():
  asked = []

  def plan(config):
    asked.append(config)
    if config.parallel.layout == 'striped':
      raise NotImplementedError('no stripes')
    return SimpleNamespace(
      fits=True,
      estimate=Estimate(compute=float(len(asked)), exposed=0.0),
      memory=SimpleNamespace(total=1),
    )

  said = []
  entries, left_out = sweep(CONFIG, 8, plan, most=3, say=said.append)
  assert len(said) == 3 and said[-1].startswith('3/3 ring')
  assert [e.refusal for e in entries[:3]] == ['', '', '']
  seconds = [e.seconds for e in entries[:3]]
  assert seconds == sorted(seconds)
  assert left_out == len(choices(CONFIG, 8)) - len(entries)
  striped = {
    (c.parallel.scheme, c.parallel.data, c.parallel.seq, c.parallel.model)
    for c in asked
    if c.parallel.layout == 'striped'
  }
  assert len(asked) == 3 + len(striped)


def test_a_plan_is_drawn(tmp_path):
  one = hops.Pass(3, 10, 1e-3, 2e-3, 2e-3)
  ring = hops.LayerRing(1, one, one)
  for rings in ((ring,), ()):
    plan = Plan(
      topology='v5e:2x4',
      kind='TPU v5 lite',
      mesh={'data': 1, 'seq': 8, 'model': 1},
      scheme='ring',
      layout='zigzag',
      remat='none',
      seq_len=64,
      batch_size=1,
      parameters=9,
      hop_links=1,
      utilization=0.5,
      link_bandwidth=45e9,
      memory=Memory(
        parameters=2**30,
        optimizer=2**31,
        batch=0,
        padding=0,
        outputs=0,
        temporaries=2**32,
        code=0,
        limit=2**32,
      ),
      refusal='',
      work=StepFlops(1.0, 1.0, again=False),
      wire_bytes={},
      collectives=[],
      attention=[hops.Attended('full', 1, 1.0, 1.0, rings)],
      estimate=Estimate(1.0, 0.0),
      temporaries=[],
      temporaries_from='',
      seconds={},
    )
    assert not plan.fits
    path = tmp_path / f'{len(rings)}.png'
    plot.plot(plan, path)
    assert path.stat().st_size > 10_000
