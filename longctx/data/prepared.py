"""Prepared datasets: tasks as TFDS (ArrayRecord), without TensorFlow.

A prepared task is an ordinary TFDS dataset, `longctx_task/<task>_<digest>`,
whose split 'train' holds examples 0, 1, 2 ... of the task's training split. The
digest is of the task's fields and the seed, which the dataset also records, so
that a run reads the examples it would have made itself, or nothing.
"""

import bisect
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging

from longctx.data.errors import DamagedDataError
from longctx.tasks import SPLITS, Task, task_fields

DATASET = 'longctx_task'
VERSION = '1.0.0'


@dataclasses.dataclass
class TaskConfig(tfds.core.BuilderConfig):
  """TFDS builder config: a task, a seed, the length of each split."""

  task: Task | None = None
  seed: int = 0
  sizes: dict[str, int] = dataclasses.field(default_factory=dict)


# Readers need no class, only the files, so TFDS need not list this one.
with tfds.core.registered.skip_registration():

  class LongctxTask(tfds.core.GeneratorBasedBuilder):
    """TFDS builder that writes the examples of a task in order."""

    name = DATASET
    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded; TFDS would look for checksums beside this file with
    # a package that it does not install.
    url_infos: ClassVar = {}

    def _info(self) -> tfds.core.DatasetInfo:
      config = self.builder_config
      arrays = config.task.get(config.seed, 'train', 0).arrays()
      features = {
        name: tfds.features.Tensor(
          shape=array.shape,
          dtype=array.dtype,
          # As bytes, a million tokens decode in milliseconds.
          encoding=tfds.features.Encoding.BYTES,
        )
        for name, array in arrays.items()
      }
      return tfds.core.DatasetInfo(
        builder=self,
        description=f'{config.task} with seed {config.seed}',
        features=tfds.features.FeaturesDict(
          {'index': np.int64, **features},
        ),
        metadata=tfds.core.MetadataDict(
          task=task_fields(config.task), seed=config.seed
        ),
        # Example i of the dataset is example i of the task.
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {
        split: self._generate_examples(split, size)
        for split, size in self.builder_config.sizes.items()
      }

    def _generate_examples(self, split: str, size: int):
      config = self.builder_config
      for index in tqdm.tqdm(range(size), desc=split, disable=None):
        arrays = config.task.get(config.seed, split, index).arrays()
        yield index, {'index': index, **arrays}


def dataset_folder(directory: str, task: Task, seed: int) -> pathlib.Path:
  """Where a task with a seed is prepared below a data directory."""
  record = json.dumps([task_fields(task), seed], sort_keys=True)
  digest = hashlib.blake2b(record.encode(), digest_size=6).hexdigest()
  name = f'{task_fields(task)["name"]}_{digest}'
  return pathlib.Path(directory).expanduser() / DATASET / name / VERSION


def prepare(
  task: Task, *, seed: int, sizes: dict[str, int], directory: str
) -> pathlib.Path:
  """Writes the first examples of each split as a TFDS dataset.

  The dataset is written aside and then renamed, so an interrupted call leaves
  nothing that looks whole, and the next one removes it; of several at once one
  wins and the others find its result.

  Args:
    sizes: number of examples by split; a split with 0 is left out.
    directory: data directory; other tasks may lie in it.

  Returns:
    The dataset's folder. One that is there, large enough and not damaged, which
    takes to read all of it, is left as it is.

  Raises:
    ValueError: nothing to write, or a smaller dataset is in the way.
    DamagedDataError: the dataset that is there cannot be read.
  """
  for split, n in sizes.items():
    if n < 0:
      raise ValueError(f'num_{split}={n} must not be negative')
  if unknown := sizes.keys() - set(SPLITS):
    raise ValueError(f'unknown splits {unknown}; known: {", ".join(SPLITS)}')
  sizes = {split: n for split, n in sizes.items() if n > 0}
  if not sizes:
    raise ValueError(
      'nothing to prepare: give num_train, num_validation or num_test'
    )
  final = dataset_folder(directory, task, seed)
  root = final.parent.parent
  root.mkdir(parents=True, exist_ok=True)
  with _aside(root) as aside:
    if final.exists():
      _check_sizes(final, sizes)
      _read_all(_open(final, task, seed), final, sizes)
      return final
    config = TaskConfig(
      name=final.parent.name, task=task, seed=seed, sizes=sizes
    )
    builder = _quiet_builder(aside, config)
    final.parent.mkdir(exist_ok=True)
    try:
      os.rename(builder.data_path, final)
    except OSError:
      # Another process was faster, or the disk refuses.
      if not final.exists():
        raise
      _check_sizes(final, sizes)
  return final


@contextlib.contextmanager
def _aside(root: pathlib.Path) -> Iterator[str]:
  """A folder to write into; removes it, and those of dead processes."""
  with contextlib.ExitStack() as stack:
    # None is removed between its making and its lock.
    with _locked(root):
      for path in root.glob('.incomplete-*'):
        with contextlib.suppress(BlockingIOError), _locked(path, wait=False):
          shutil.rmtree(path, ignore_errors=True)
      aside = tempfile.mkdtemp(prefix='.incomplete-', dir=root)
      stack.callback(shutil.rmtree, aside, ignore_errors=True)
      stack.enter_context(_locked(aside))
    yield aside


@contextlib.contextmanager
def _locked(folder: str | os.PathLike, *, wait: bool = True) -> Iterator[None]:
  """Holds the lock of a folder, which a dead process no longer holds.

  Raises:
    BlockingIOError: it may not wait for another process that holds it, or there
      is no telling, as a file system without locks.
  """
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
      if not wait:
        raise BlockingIOError from error
    yield
  finally:
    os.close(handle)


def _read_all(
  builder: tfds.core.DatasetBuilder,
  folder: pathlib.Path,
  sizes: dict[str, int],
) -> None:
  """Raises DamagedDataError where an example of some splits cannot be read."""
  for split in sizes:
    source = _source(builder, folder, split)
    for index in tqdm.tqdm(range(len(source)), desc=f'{split}', disable=None):
      source[index]


def _quiet_builder(data_dir: str, config: TaskConfig) -> LongctxTask:
  """Writes the dataset without TFDS's own bars and lines."""
  tfds.disable_progress_bar()
  verbosity = logging.get_verbosity()
  with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
    # Every config here is one that TFDS has not seen; it warns of that.
    logging.set_verbosity(logging.ERROR)
    try:
      builder = LongctxTask(
        data_dir=data_dir, config=config, file_format='array_record'
      )
      builder.download_and_prepare()
    finally:
      logging.set_verbosity(verbosity)
  return builder


def _check_sizes(folder: pathlib.Path, sizes: dict[str, int]) -> None:
  """Raises ValueError where a prepared dataset has fewer examples."""
  splits = _builder(folder).info.splits
  for split, wanted in sizes.items():
    found = splits[split].num_examples if split in splits else 0
    if found < wanted:
      raise ValueError(
        f'{folder} already holds {found} {split} examples, fewer than {wanted}:'
        ' remove it, or prepare into another data_dir'
      )


def _builder(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
  try:
    builder = tfds.builder_from_directory(folder)
    # TFDS reads metadata when it is first looked at.
    dict(builder.info.metadata or {})
    return builder
  except Exception as error:
    # TFDS, protobuf and JSON each raise their own for a damaged file.
    raise DamagedDataError(
      f'the prepared dataset {folder} cannot be read '
      f'({_first_line(error)}): remove it and prepare it again'
    ) from error


@dataclasses.dataclass(frozen=True)
class PreparedSource:
  """The examples of one prepared split; a random-access source for Grain.

  Attributes:
    files: which hold them, and the number of examples in each.
  """

  folder: pathlib.Path
  split: str
  records: Any
  files: dict[str, int]

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise ValueError(
        f'{self.split} example {index} is past the end of the {len(self)} '
        f'prepared in {self.folder}: prepare more into another data_dir'
      )
    try:
      record = dict(self.records[index])
    except Exception as error:
      raise self._damage(index, _first_line(error)) from error
    found = int(record.pop('index'))
    if found != index:
      raise self._damage(index, f'it says that it is {found}')
    return record

  def _damage(self, index: int, reason: str) -> DamagedDataError:
    ends = list(itertools.accumulate(self.files.values()))
    name = list(self.files)[bisect.bisect_right(ends, index)]
    return DamagedDataError(
      f'{self.split} example {index} in {self.folder / name} is damaged '
      f'({reason}): remove the folder and prepare it again, with the same '
      'command; a run then continues'
    )


def open_prepared(
  directory: str, task: Task, *, split: str, seed: int
) -> PreparedSource:
  """Opens a prepared split of exactly this task and seed.

  Raises:
    ValueError: the directory is missing, or holds another task or seed, no such
      split, a damaged dataset or one made from other text; one line says
      which, and what to do.
  """
  folder = dataset_folder(directory, task, seed)
  if not folder.is_dir():
    raise ValueError(_why_absent(directory, task, seed))
  builder = _open(folder, task, seed)
  if split not in builder.info.splits:
    raise ValueError(
      f'{folder} has no {split} examples: prepare them, with '
      f'--num_{split}=N, into another data_dir'
    )
  source = _source(builder, folder, split)
  _check_same(source[0], task.get(seed, split, 0).arrays(), folder)
  return source


def _open(
  folder: pathlib.Path, task: Task, seed: int
) -> tfds.core.DatasetBuilder:
  """A dataset that records this task and seed."""
  builder = _builder(folder)
  wanted = {'task': task_fields(task), 'seed': seed}
  recorded = dict(builder.info.metadata or {})
  if recorded != wanted:
    raise DamagedDataError(
      f'the prepared dataset {folder} records {recorded}, not {wanted}: '
      'remove it and prepare it again'
    )
  return builder


def _source(
  builder: tfds.core.DatasetBuilder, folder: pathlib.Path, split: str
) -> PreparedSource:
  try:
    records = builder.as_data_source(split)
    info = builder.info.splits[split]
    files = dict(zip(sorted(info.filenames), info.shard_lengths, strict=True))
  except Exception as error:
    raise DamagedDataError(
      f'the {split} files in {folder} cannot be read ({_first_line(error)}): '
      'remove the folder and prepare it again'
    ) from error
  return PreparedSource(folder, split, records, files)


def _check_same(
  found: dict[str, np.ndarray],
  wanted: dict[str, np.ndarray],
  folder: pathlib.Path,
) -> None:
  """Raises ValueError where a prepared example is not what the task makes."""
  if found.keys() != wanted.keys() or not all(
    np.array_equal(found[name], wanted[name]) for name in wanted
  ):
    raise ValueError(
      f'the prepared dataset {folder} holds other examples than this task makes'
      ' now: its text or its code has changed; remove it and prepare it again'
    )


def _why_absent(directory: str, task: Task, seed: int) -> str:
  """One line on what lies in a directory in place of the dataset wanted."""
  wanted = {**task_fields(task), 'seed': seed}
  command = (
    f'python -m longctx.data prepare --task={wanted["name"]} '
    f'--data_dir={directory}'
  )
  root = pathlib.Path(directory).expanduser()
  others = []
  for path in sorted(root.glob(f'{DATASET}/*/{VERSION}/metadata.json')):
    # A damaged neighbour is not what was asked for.
    with contextlib.suppress(ValueError, KeyError, TypeError):
      record = json.loads(path.read_text())
      others.append({**record['task'], 'seed': record['seed']})
  if not others:
    return f'{directory} holds no prepared task; write one with: {command}'
  differences = min((_differences(wanted, o) for o in others), key=len)
  return (
    f'{directory} holds {len(others)} prepared task(s), none of them this one; '
    f'the closest differs in {", ".join(differences)}; see: {command}'
  )


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
  if wanted['name'] != found['name']:
    return [f'the task ({found["name"]} there, {wanted["name"]} here)']
  return [
    f'{key} ({found.get(key)!r} there, {wanted[key]!r} here)'
    for key in wanted
    if wanted[key] != found.get(key)
  ]


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
