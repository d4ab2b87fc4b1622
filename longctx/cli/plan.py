r"""What a config costs on a machine that is not there.

    python -m longctx.plan --config=configs/ring_1m.py:pod --topology=v5p:4x4x8
    python -m longctx.plan --config=configs/ring_1m.py:pod \
      --topology=v5e:16x16 --config.parallel.seq=64 --plot=plan.png
    python -m longctx.plan --config=configs/ring_1m.py:pod --topology=h100:8 \
      --config.parallel.data=1 --config.parallel.seq=8
    python -m longctx.plan --config=configs/ring_1m.py:pod \
      --topology=v5p:4x4x8 --sweep --most=4

The config and its overrides are those of train.py. `docs/planning.md` reads a
report.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import flags

from longctx.cli import flags as cli
from longctx.plan import hops, plot, report, topologies
from longctx.plan import sweep as sweep_lib
from longctx.plan.planner import Plan, make_plan
from longctx.plan.program import find_run
from longctx.training.config import ExperimentConfig, from_config_dict

_TOPOLOGY = flags.DEFINE_string(
  'topology', '', 'generation:shape, as in v5p:4x4x8, v5e:16x16 or h100:8'
)
_RUN = flags.DEFINE_string('run', '', 'which run, of a config that has several')
_UTILIZATION = flags.DEFINE_float(
  'utilization', hops.UTILIZATION, 'share of the peak that products reach'
)
_JSON = flags.DEFINE_bool('json', False, 'print JSON instead of text')


_PLOT = flags.DEFINE_string('plot', '', 'a PNG of memory and hops to write')
_SWEEP = flags.DEFINE_bool(
  'sweep', False, 'try schemes, layouts, remat policies and meshes, and rank'
)
_MOST = flags.DEFINE_integer(
  'most', sweep_lib.MOST, 'programs that a sweep compiles', lower_bound=1
)


def main(argv: list[str]):
  # The compilers of other machines run beside it.
  jax.config.update('jax_platforms', 'cpu')
  with cli.before_compiling():
    # Configs say which size they take, and JSON stands alone.
    with contextlib.redirect_stdout(sys.stderr):
      _, overridden = cli.parse_config_flags(argv)
    config = from_config_dict(ExperimentConfig, overridden)
    config = find_run(config, _RUN.value)
    if not _TOPOLOGY.value:
      raise ValueError('--topology=GENERATION:SHAPE is missing, e.g. v5p:4x4x8')
    plan = functools.partial(
      make_plan, topology=_TOPOLOGY.value, utilization=_UTILIZATION.value
    )
    if _SWEEP.value:
      _sweep(config, plan)
      return
    found = plan(config)
    if _PLOT.value:
      plot.plot(found, pathlib.Path(_PLOT.value))
  if _JSON.value:
    print(json.dumps(report.to_json(found), indent=2))
  else:
    print(report.text(found))


def _sweep(config: ExperimentConfig, plan: Callable[..., Plan]):
  devices = len(topologies.describe(_TOPOLOGY.value))
  entries, left_out = sweep_lib.sweep(
    config,
    devices,
    plan,
    most=_MOST.value,
    say=lambda text: print(text, file=sys.stderr, flush=True),
  )
  if _JSON.value:
    rows = [dataclasses.asdict(entry) for entry in entries]
    print(json.dumps({'entries': rows, 'left_out': left_out}, indent=2))
  else:
    print(*sweep_lib.table(entries, left_out), sep='\n')
