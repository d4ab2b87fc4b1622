r"""Plan of what a config costs on a machine that is not there.

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
import json
import sys
from collections.abc import Callable

import jax

from longctx.cli import config_file
from longctx.plan import hops, plot, report, topologies
from longctx.plan import sweep as sweep_lib
from longctx.plan.planner import Plan, make_plan
from longctx.plan.program import find_run
from longctx.training import metrics
from longctx.training.config import ExperimentConfig, from_config_dict
from longctx.training.progress import Progress


def prepare(args) -> Callable[[], None]:
  """Compiles: what a machine refuses is told in a line too."""
  # The compilers of other machines run beside it.
  jax.config.update('jax_platforms', 'cpu')
  # Configs say which size they take, and JSON stands alone.
  with contextlib.redirect_stdout(sys.stderr):
    config = config_file.load(args.config, args.overrides)
  config = find_run(from_config_dict(ExperimentConfig, config), args.run)
  # Before a backend starts, which a progress bar asks who it is.
  devices = len(topologies.describe(args.topology))
  most = (args.most or sweep_lib.MOST) if args.sweep else 1
  with Progress('plan', most, unit='program') as progress:
    return _compile(args, config, devices, most, progress)


def _compile(
  args, config: ExperimentConfig, devices: int, most: int, progress: Progress
) -> Callable[[], None]:
  def plan(config: ExperimentConfig) -> Plan:
    utilization = args.utilization or hops.UTILIZATION
    with progress.doing('compiling'):
      found = make_plan(config, args.topology, utilization=utilization)
    progress.advance()
    return found

  if args.sweep:
    entries, left_out = sweep_lib.sweep(
      config, devices, plan, most=most, say=metrics.say
    )
    rows = [dataclasses.asdict(entry) for entry in entries]
    as_json = {'entries': rows, 'left_out': left_out}
    text = '\n'.join(sweep_lib.table(entries, left_out))
  else:
    found = plan(config)
    if args.plot:
      plot.plot(found, args.plot)
    as_json, text = report.to_json(found), report.text(found)
  return lambda: print(json.dumps(as_json, indent=2) if args.json else text)
