r"""Measures a trained workdir, as trained or at other values of its task.

python eval.py --workdir=runs/mqar
python eval.py --workdir=runs/mqar --sweep=seq_len=64,128,256 --batches=32
"""

import pathlib
import sys

from absl import flags

from longctx import cli, evaluate
from longctx.config import ExperimentConfig
from longctx.runs import start_devices

_WORKDIR = flags.DEFINE_string('workdir', '', 'folder that train.py wrote')
_SWEEP = flags.DEFINE_string(
  'sweep', '', 'field of the task and its values, as seq_len=64,128,256'
)
_SPLIT = flags.DEFINE_enum(
  'split', 'test', ['train', 'validation', 'test'], 'examples to measure on'
)
_BATCHES = flags.DEFINE_integer(
  'batches', 16, 'batches at each value', lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 0, 'rows of a batch; 0: as in validation', lower_bound=0
)


def _devices(config: ExperimentConfig) -> int:
  return config.parallel.devices


def main(argv: list[str]):
  with cli.before_compiling():
    cli.parse_flags(argv)
    if not _WORKDIR.value:
      raise ValueError('--workdir=DIR is missing: a folder that train.py wrote')
    workdir = pathlib.Path(_WORKDIR.value)
    sweep = evaluate.parse_sweep(_SWEEP.value)
    runs = evaluate.open_workdir(workdir)
    start_devices(max((r.config for r in runs), key=_devices))
    for run in runs:
      evaluate.swept_tasks(run, sweep, batch_size=_BATCH_SIZE.value)
  with cli.while_running():
    evaluate.evaluate(
      runs,
      workdir,
      sweep=sweep,
      split=_SPLIT.value,
      batches=_BATCHES.value,
      batch_size=_BATCH_SIZE.value,
    )


if __name__ == '__main__':
  main(sys.argv)
