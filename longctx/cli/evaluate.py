r"""Measures a trained workdir, as trained or at other values of its task.

python eval.py --workdir=runs/mqar
python eval.py sweep --workdir=runs/mqar --task.seq_len=64,128,256 --batches=32

Other modes, each with its --help:

python eval.py stream --workdir=runs/bytes_lm --tokens=1000000
python eval.py s2a --workdir=runs/s2a --distractors=0,8,64,256
"""

import functools
from collections.abc import Callable

from longctx.evaluation import sweep
from longctx.training.runs import start_devices


def prepare(args) -> Callable[[], object]:
  """Opens the runs and checks every value of the task."""
  fields = [word.removeprefix('--task.') for word in args.overrides]
  if len(fields) > 1:
    raise ValueError(f'one field is swept at a time, not {len(fields)}')
  swept = sweep.parse_sweep(*(fields or ['']))
  runs = sweep.open_workdir(args.workdir)
  start_devices(max((r.config for r in runs), key=lambda c: c.parallel.devices))
  for run in runs:
    sweep.swept_tasks(run, swept, batch_size=args.batch_size)
  return functools.partial(
    sweep.evaluate,
    runs,
    args.workdir,
    sweep=swept,
    split=args.split,
    batches=args.batches,
    batch_size=args.batch_size,
  )
