"""Prepared datasets: writes a task as a TFDS dataset (ArrayRecord).

python -m longctx.data prepare --task=mqar --task.num_pairs=8 --data_dir=DIR
python -m longctx.data prepare --config=configs/mqar.py --data_dir=DIR
"""

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from longctx.data.prepared import prepare
from longctx.tasks import Task, make_task, task_defaults


def main(argv: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m longctx.data',
    description='Write a task as a TFDS dataset (ArrayRecord).',
    allow_abbrev=False,
  )
  parser.add_argument('command', choices=['prepare'])
  parser.add_argument('--data_dir', required=True, help='where to write')
  parser.add_argument(
    '--config', help='config file; --config.x=y overrides it as in train.py'
  )
  parser.add_argument('--task', help='task; --task.x=y sets its fields')
  parser.add_argument('--seed', type=int, help="the config's, else 0")
  for split in ('train', 'validation', 'test'):
    parser.add_argument(
      f'--num_{split}',
      type=int,
      help='examples; default: what the config reads, else 0',
    )
  args, overrides = parser.parse_known_args(argv)
  try:
    if bool(args.config) == bool(args.task):
      raise ValueError('give either --config=FILE or --task=NAME')
    read = read_config if args.config else read_task
    task, seed, sizes = read(args.config or args.task, overrides)
    given = {split: getattr(args, f'num_{split}') for split in sizes}
    sizes |= {split: n for split, n in given.items() if n is not None}
    seed = seed if args.seed is None else args.seed
    folder = prepare(task, seed=seed, sizes=sizes, directory=args.data_dir)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'{folder} holds {sizes} examples of {task} with {seed=}')
  return 0


def read_task(
  name: str, overrides: Sequence[str]
) -> tuple[Task, int, dict[str, int]]:
  """The task, seed and split sizes of `--task=NAME --task.x=y ...`."""
  fields = {}
  for argument in overrides:
    key, equals, value = argument.removeprefix('--task.').partition('=')
    if not argument.startswith('--task.') or not equals:
      raise ValueError(f'unknown argument {argument!r}; fields are --task.x=y')
    kind = type(task_defaults(name).get(key, ''))
    # A text field takes its text as it stands, quotes or not.
    fields[key] = value if kind is str else _literal(value)
  sizes = {'train': 0, 'validation': 0, 'test': 0}
  return make_task(name, **fields), 0, sizes


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def read_config(
  path: str, overrides: Sequence[str]
) -> tuple[Task, int, dict[str, int]]:
  """The task and seed of a config file, and the examples that it reads.

  Raises:
    ValueError: no such file, an unknown key, a value of the wrong type, or runs
      that differ in what is prepared.
  """
  # A colon separates the file from an argument for its get_config.
  file = path.partition(':')[0]
  if not os.path.isfile(file):
    raise ValueError(f'there is no config file {file!r}')
  argv = ['prepare', f'--config={path}', *overrides]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    'config', flag_values=values, sys_argv=argv
  )
  try:
    unknown = values(argv)[1:]
    config = holder.value
  except (AttributeError, OSError, TypeError, flags.Error) as error:
    raise ValueError(
      f'config {path}: {" ".join(str(error).split())}'
    ) from error
  if unknown:
    raise ValueError(f'unknown argument {unknown[0]!r}')
  for name, run in config.runs.items():
    if 'task' in run or 'seed' in run:
      raise ValueError(
        f'run {name!r} of {path} has its own task or seed: prepare each task '
        'with --task'
      )
  rows = config.eval.batch_size or config.batch_size
  sizes = {
    'train': config.steps * config.batch_size,
    'validation': config.eval.batches * rows,
    'test': config.eval.test_batches * rows,
  }
  return make_task(**config.task.to_dict()), config.seed, sizes
