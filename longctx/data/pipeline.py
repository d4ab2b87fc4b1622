"""Input pipeline: batches of task examples, in an order fixed by the seed.

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

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags
from grain import experimental

from longctx.data.prepared import open_prepared
from longctx.tasks import Task, task_fields

Batch = dict[str, np.ndarray]

# Larger than any run; Grain wants every dataset to have a length.
ENDLESS = 2**48

# What ends or stops a run, which closes its workers when it is done with them.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


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
  """Batch iterator over Grain, with a position that is one number.

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
    with contextlib.ExitStack() as stack:
      if self._batches is None and self._workers:
        # They start with the first batch.
        stack.enter_context(_blocked_signals())
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
      # Through pipes, as shared memory outlives a worker that is killed.
      dataset = experimental.WithOptionsIterDataset(
        dataset, experimental.DatasetOptions(min_shm_size=ENDLESS)
      )
      options = grain.MultiprocessingOptions(
        num_workers=self._workers, per_worker_buffer_size=2
      )
      dataset = dataset.mp_prefetch(options, _end_with_parent)
    return iter(dataset)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
  """Keeps signals from the threads and processes that are started meanwhile.

  A terminal sends them to workers too, and some clusters do: these would print
  a page each, and be gone before the run has saved.
  """
  # Its start would let them through again.
  resource_tracker.ensure_running()
  before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(index: int, count: int) -> None:
  """Ends this worker where the run is killed and cannot do so."""
  del index, count

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
