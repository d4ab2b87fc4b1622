"""Batches of task examples, in an order that nothing can change.

  batches = make_iterator(task, split='train', batch_size=32, seed=0)
  batch = next(batches)            # {'tokens': int32[B, T], 'labels': ..., ...}
  state = batches.get_state()      # plain JSON
  batches.set_state(state)         # the next batch is the one that came next

Row r of batch b is example b * batch_size + r of the split, whatever the number
of processes, threads and workers, and wherever reading began. The examples are
made as they are needed, or read from a TFDS dataset that holds the same ones:

  python -m longctx.data prepare --task=mqar --task.num_pairs=8 --data_dir=DIR
  python -m longctx.data prepare --config=configs/mqar.py --data_dir=DIR
  python train.py --config=configs/mqar.py --config.data.directory=DIR
"""

import argparse
import ast
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import config_flags

from longctx.prepared import open_prepared, prepare
from longctx.tasks import Task, make_task, task_defaults, task_fields

Batch = dict[str, np.ndarray]

# Larger than any run; Grain wants every dataset to have a length.
ENDLESS = 2**48


@dataclasses.dataclass(frozen=True)
class TaskSource:
  """The examples of a split as a random-access source for Grain."""

  task: Task
  split: str
  seed: int

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> Batch:
    return self.task.get(self.seed, self.split, index).arrays()


def make_iterator(
  task: Task,
  *,
  split: str,
  batch_size: int,
  seed: int,
  start: int = 0,
  workers: int = 0,
  num_examples: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  directory: str = '',
) -> 'BatchIterator':
  """Iterates over batches of a split.

  Args:
    task: where examples come from.
    split: 'train', 'validation' or 'test'.
    batch_size: rows of a batch over all processes together.
    seed: of the examples; another seed gives other examples of the same split.
    start: number of the first batch.
    workers: processes that make batches; 0 makes them in a thread of this one,
      which is faster unless examples are expensive. Starting them takes
      seconds, and a script that asks for them needs `if __name__ ==
      '__main__':`.
    num_examples: the iterator ends after these; None never ends. Rows of the
      last batch beyond them repeat the last example with weight 0, so that
      every batch has one shape.
    process_index: which process this is; it gets rows
      [process_index * k, (process_index + 1) * k), k = batch_size /
      process_count, of every batch.
    process_count: number of processes.
    directory: a data directory in which this task and seed were prepared; the
      examples are read from there. Empty: they are made as they are needed.

  Returns:
    An iterator of dicts of numpy arrays [k, T]: tokens, labels, weights,
    segment_ids where the task packs documents, and relevant where it says which
    tokens its answers depend on.

  Raises:
    ValueError: an argument out of range, or a directory that does not hold
      these examples; the message says which. Reading past the end of a prepared
      split raises it too.
  """
  if batch_size < 1 or process_count < 1 or batch_size % process_count:
    raise ValueError(
      f'{batch_size=} must be a positive multiple of {process_count=}'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f'{process_index=} must be in [0, {process_count})')
  if start < 0 or workers < 0:
    raise ValueError(f'{start=} and {workers=} must not be negative')
  if num_examples is not None and num_examples < 1:
    raise ValueError(f'{num_examples=} must be at least 1')
  # Either way a bad split or seed fails here, and not in a thread or worker.
  if directory:
    source = open_prepared(directory, task, split=split, seed=seed)
  else:
    task.get(seed, split, 0)
    source = TaskSource(task, split, seed)
  if (num_examples or 0) > len(source):
    raise ValueError(
      f'{num_examples=} is more than the {len(source)} {split} examples '
      f'prepared in {directory}'
    )
  rows = Rows(
    source,
    batch_size=batch_size,
    num_examples=num_examples,
    first_row=process_index * (batch_size // process_count),
    rows_per_batch=batch_size // process_count,
  )
  identity = {
    **{f'task.{name}': value for name, value in task_fields(task).items()},
    'split': split,
    'seed': seed,
    'batch_size': batch_size,
  }
  return BatchIterator(rows, identity=identity, start=start, workers=workers)


@dataclasses.dataclass(frozen=True)
class Rows:
  """One process's rows of all batches, end to end: a source for Grain.

  Row r of batch b is example b * batch_size + first_row + r.
  """

  source: Any
  _: dataclasses.KW_ONLY
  batch_size: int
  num_examples: int | None
  first_row: int
  rows_per_batch: int

  @property
  def num_batches(self) -> int:
    """Number of batches; the last one is padded if its end was asked for."""
    if self.num_examples is None:
      return len(self.source) // self.batch_size
    return -(-self.num_examples // self.batch_size)

  def __len__(self) -> int:
    return self.num_batches * self.rows_per_batch

  def __getitem__(self, row: int) -> Batch:
    batch, offset = divmod(row, self.rows_per_batch)
    index = batch * self.batch_size + self.first_row + offset
    if self.num_examples is None or index < self.num_examples:
      return self.source[index]
    example = self.source[self.num_examples - 1]
    return example | {'weights': np.zeros_like(example['weights'])}


class BatchIterator(Iterator[Batch]):
  """Batches from Grain, with a position that is one number.

  The position does not depend on workers or processes, so a run may be
  continued with another number of either.
  """

  def __init__(
    self, rows: Rows, *, identity: dict[str, Any], start: int, workers: int
  ):
    self._rows = rows
    self._identity = identity
    self._workers = workers
    self._next_batch = start
    self._batches = None

  def __next__(self) -> Batch:
    if self._batches is None:
      self._batches = self._open()
    try:
      batch = next(self._batches)
    except StopIteration:
      if self._rows.num_examples is None:
        # No prepared batch is left whole: the source says so better.
        self._rows.source[len(self._rows.source)]
      raise
    self._next_batch += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position and what it is a position in, as plain JSON."""
    return {'next_batch': self._next_batch, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position that `get_state` gave.

    Raises:
      ValueError: the state is a position in other data.
    """
    for key, ours in self._identity.items():
      if state.get(key) != ours:
        raise ValueError(
          f'this data position was saved with {key}={state.get(key)!r}, and '
          f'this run has {key}={ours!r}: its batches are others'
        )
    self.close()
    self._next_batch = state['next_batch']

  def close(self) -> None:
    """Stops threads and workers; the iterator can still be continued."""
    if self._batches is not None:
      self._batches.close()
      self._batches = None

  def _open(self) -> Iterator[Batch]:
    rows = self._rows
    dataset = grain.MapDataset.source(rows)
    dataset = dataset[self._next_batch * rows.rows_per_batch :]
    dataset = dataset.batch(rows.rows_per_batch)
    dataset = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    if self._workers:
      # Grain's workers read absl flags, which only absl programs parse.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(
        num_workers=self._workers, per_worker_buffer_size=2
      )
      dataset = dataset.mp_prefetch(options)
    return iter(dataset)


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


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
