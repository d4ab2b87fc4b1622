"""Prepared datasets: writes a task as a TFDS dataset (ArrayRecord).

python -m longctx.data prepare --task=mqar --task.num_pairs=8 --data_dir=DIR
python -m longctx.data prepare --config=configs/mqar.py --data_dir=DIR
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any

from longctx.cli import config_file
from longctx.data import prepared
from longctx.tasks import Task, make_task, task_defaults


def prepare(args) -> Callable[[], None]:
  """Writes the dataset: what cannot be written is refused on the way."""
  if bool(args.config) == bool(args.task):
    raise ValueError('give either --config=FILE or --task=NAME')
  read = read_config if args.config else read_task
  task, seed, sizes = read(args.config or args.task, args.overrides)
  given = {split: getattr(args, f'num_{split}') for split in sizes}
  sizes |= {split: n for split, n in given.items() if n is not None}
  seed = seed if args.seed is None else args.seed
  folder = prepared.prepare(
    task, seed=seed, sizes=sizes, directory=args.data_dir
  )
  return lambda: print(
    f'{folder} holds {sizes} examples of {task} with {seed=}'
  )


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
    fields[key] = value if kind is str else literal(value)
  sizes = {'train': 0, 'validation': 0, 'test': 0}
  return make_task(name, **fields), 0, sizes


def literal(text: str) -> Any:
  """A value in Python's spelling, or the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def read_config(
  spec: str, overrides: Sequence[str]
) -> tuple[Task, int, dict[str, int]]:
  """The task and seed of a config file, and the examples that it reads.

  Raises:
    ValueError, OSError, flags.Error: as `config_file.load`, or runs that differ
      in what is prepared.
  """
  config = config_file.load(spec, overrides)
  for name, run in config.runs.items():
    if 'task' in run or 'seed' in run:
      raise ValueError(
        f'run {name!r} of {spec} has its own task or seed: prepare each task '
        'with --task'
      )
  rows = config.eval.batch_size or config.batch_size
  sizes = {
    'train': config.steps * config.batch_size,
    'validation': config.eval.batches * rows,
    'test': config.eval.test_batches * rows,
  }
  return make_task(**config.task.to_dict()), config.seed, sizes
