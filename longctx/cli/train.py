r"""Trains what a config file describes, or continues where it was stopped.

python train.py --config=configs/mqar.py
python train.py --config=configs/mqar.py:linear --workdir=/data/mqar \
  --config.steps=500 --config.optimizer.learning_rate=3e-3

Several processes, one per host, each with the same command but for its number:

python train.py --config=configs/ring_1m.py:pod --coordinator=auto
python train.py --config=configs/ring_1m.py:sibling \
  --coordinator=localhost:1234 --num_processes=2 --process_id=0
"""

import functools
import pathlib
from collections.abc import Callable

from longctx.cli import config_file
from longctx.training import runs, trainer, warm_start
from longctx.training.config import ExperimentConfig, from_config_dict


def prepare(args) -> Callable[[], object]:
  """Checks everything that can be checked before anything compiles."""
  config = config_file.load(args.config, args.overrides)
  config = from_config_dict(ExperimentConfig, config)
  workdir = args.workdir or default_workdir(args.config)
  number, count = args.process_id, args.num_processes
  if not args.coordinator and (number is not None or count is not None):
    raise ValueError(
      '--process_id and --num_processes are of several processes: give '
      '--coordinator=HOST:PORT, where the first one listens'
    )
  if number is not None and count is not None and number >= count:
    raise ValueError(
      f'--process_id={number} must be below --num_processes={count}: processes '
      'are counted from 0'
    )
  runs.start_devices(
    config,
    coordinator=args.coordinator,
    num_processes=count,
    process_id=number,
  )
  prepared = runs.prepare(config, workdir)
  for run in prepared:
    warm_start.check(run)
  return functools.partial(trainer.train, prepared, workdir)


def default_workdir(spec: str) -> pathlib.Path:
  """runs/<config>, or runs/<config>-<argument>, beside nothing else."""
  path, _, argument = spec.partition(':')
  name = pathlib.Path(path).stem + (f'-{argument}' if argument else '')
  return pathlib.Path('runs') / name
