"""The runs of an experiment: checked as far as that goes without compiling."""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from longctx import parallel, tasks
from longctx.data.pipeline import BatchIterator, make_iterator
from longctx.models import TransformerConfig, validate
from longctx.parallel import Placement, processes
from longctx.parallel.layout import SequenceLayout
from longctx.tasks.text_lm import TextLM
from longctx.training import checks, metrics, metrics_log, resumption, steps
from longctx.training import config as config_lib
from longctx.training.checkpoint import Checkpointer
from longctx.training.config import ExperimentConfig, ParallelConfig
from longctx.training.errors import DamagedFileError
from longctx.training.lock import locked
from longctx.training.log_files import read_json, write_json, write_text

# Where a workdir keeps the tokenizer of its task.
TOKENIZER = 'tokenizer'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Run of an experiment: `name` is '' for its only one.

  Attributes:
    placement: where the tokens lie on a mesh; None: on one device.
  """

  name: str
  config: ExperimentConfig
  task: tasks.Task
  model: TransformerConfig
  workdir: pathlib.Path
  placement: Placement | None = None


def resolve_model(
  model: TransformerConfig, task: tasks.Task
) -> TransformerConfig:
  """Takes from the task what the model leaves open."""
  positions = model.max_positions
  if model.position_encoding == 'learned':
    positions = positions or task.seq_len
  return dataclasses.replace(
    model,
    vocab_size=model.vocab_size or task.vocab_size,
    max_positions=positions,
  )


def with_own_tokenizer(
  task: Mapping[str, Any], folder: pathlib.Path
) -> dict[str, Any]:
  """Fields of a task, its tokenizer the copy that a workdir keeps, if any."""
  own = folder / TOKENIZER
  kept = 'tokenizer' in task and own.is_dir()
  return {**task, **({'tokenizer': str(own)} if kept else {})}


def start_devices(
  config: ExperimentConfig,
  *,
  coordinator: str = '',
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins other processes and makes the devices that the meshes ask for.

  Before anything uses a device.

  Args:
    config: whose runs have meshes.
    coordinator: see `parallel.join_processes`; '' for a process on its own.
    num_processes: how many processes there are.
    process_id: which one this is.
  """
  most = max(
    one.parallel.devices for one in config_lib.expand_runs(config).values()
  )
  note = parallel.ensure_devices(-(-most // (num_processes or 1)))
  if coordinator:
    parallel.join_processes(coordinator, num_processes, process_id)
  if note:
    metrics.say(note)


def prepare(config: ExperimentConfig, workdir: pathlib.Path) -> list[Run]:
  """Checks everything that can be checked before anything compiles.

  Raises:
    ValueError, NotImplementedError: a config that cannot work.
    OSError, LockedError, WriteError: a workdir that cannot be used.
    CheckpointError: the workdir holds checkpoints of another model.
  """
  runs = []
  for name, one in config_lib.expand_runs(config).items():
    task = tasks.make_task(**one.task)
    model = resolve_model(one.model, task)
    placement = make_placement(one.parallel, task.seq_len)
    checks.check_memory(one, task.seq_len)
    check_task(one, task, model)
    traced = validate(
      model,
      task.seq_len,
      batch_size=one.batch_size // one.optimizer.accumulation,
      placement=placement,
    )
    checks.check_memory(one, task.seq_len, traced.parameter_bytes)
    checks.warn_of_later_tokens(one, task, traced)
    for split in tasks.SPLITS:
      open_batches(one, task, split, placement=placement).close()
    if one.log.tensorboard:
      metrics_log.make_summary_writer()
    runs.append(
      Run(
        name=name,
        config=one,
        task=task,
        model=model,
        workdir=workdir / name,
        placement=placement,
      )
    )
  with locked(workdir):
    _check_names(runs, workdir)
    done = {run.workdir: _check_workdir(run) for run in runs}
    processes.meet('longctx/workdirs')
    configs = {run.workdir: run.config for run in runs} | {workdir: config}
    finished = all(done[run.workdir] == run.config.steps for run in runs)
    for run in runs:
      if isinstance(run.task, TextLM):
        for name, text in run.task.codec.files().items():
          write_text(run.workdir / TOKENIZER / name, text)
    for folder, one in configs.items():
      write_json(folder / 'config.json', config_lib.to_dict(one), sealed=True)
      steps_done, whole = done.get(folder), _is_whole(folder / 'versions.json')
      if not whole or (steps_done != one.steps and not finished):
        versions = metrics.versions()
        write_json(folder / 'versions.json', versions, sealed=True)
  return runs


def read_config(workdir: pathlib.Path) -> ExperimentConfig:
  """The config of a workdir.

  Raises:
    DamagedFileError: config.json is not what was written.
    OSError: it cannot be read.
  """
  path = workdir / 'config.json'
  value = read_json(path)
  try:
    return config_lib.from_config_dict(ExperimentConfig, value)
  except (ValueError, TypeError, AttributeError) as error:
    raise DamagedFileError(f'{path}: {error}') from error


def _is_whole(path: pathlib.Path) -> bool:
  try:
    return bool(read_json(path))
  except (DamagedFileError, OSError):
    return False


def check_task(
  config: ExperimentConfig, task: tasks.Task, model: TransformerConfig
) -> None:
  """Refuses a model that the task does not suit.

  Args:
    config: of the run.
    task: of the run.
    model: with the vocabulary resolved.

  Raises:
    ValueError, NotImplementedError: with the reason.
  """
  if model.vocab_size < task.vocab_size:
    raise ValueError(
      f'model.vocab_size={model.vocab_size} is too small for the task, which '
      f'needs {task.vocab_size}'
    )
  if model.gate.keep:
    _check_gate(config, task)


def _check_gate(config: ExperimentConfig, task: tasks.Task):
  """Refuses tasks that ask more than one question, by their first examples."""
  gate = config.model.gate
  if config.analysis.every:
    raise NotImplementedError(
      f'analysis.every={config.analysis.every}: analysis walks through all '
      'tokens, and a gate lets few of them pass; take analysis.every=0'
    )
  for index in range(8):
    example = task.get(config.seed, 'train', index)
    if example.segment_ids is not None:
      raise NotImplementedError(
        'a gate has one question per row, and the task packs documents'
      )
    scored = np.flatnonzero(example.weights)
    span = int(scored[-1] - scored[0]) + 1 if scored.size else 0
    if span > gate.answer:
      raise ValueError(
        f'gate.answer={gate.answer} is too small for answers that take {span} '
        'tokens: a row has one question, and its answer comes at once'
      )
    if gate.labels and example.relevant is None:
      raise ValueError(
        f'the task does not tell what is relevant, which gate.labels='
        f'{gate.labels} needs: take labels=0, to learn from answers alone'
      )


def _check_names(runs: list[Run], workdir: pathlib.Path):
  """Refuses a folder that holds runs which this config does not name."""
  try:
    old = config_lib.expand_runs(read_config(workdir))
  except (DamagedFileError, OSError):
    return
  left = old.keys() - {run.name for run in runs}
  left = [n for n in sorted(left) if _has_checkpoints(workdir / n)]
  if left:
    names = ', '.join(name or 'one without a name' for name in left)
    raise ValueError(
      f'{workdir} holds runs that config.runs does not name ({names}): name '
      'them, delete their checkpoints, or give another --workdir'
    )


def _has_checkpoints(folder: pathlib.Path) -> bool:
  return any((folder / 'checkpoints').glob('[0-9]*'))


def _check_workdir(run: Run) -> int:
  """Refuses a folder that holds another run, and says what changes.

  Returns:
    Updates made so far, as far as checkpoints can be read.
  """
  run.workdir.mkdir(parents=True, exist_ok=True)
  for path in (run.workdir, *run.workdir.glob('*')):
    if not os.access(path, os.R_OK | os.W_OK):
      raise PermissionError(13, 'cannot be read and written', str(path))
  if not _has_checkpoints(run.workdir):
    return 0
  folder = run.workdir / 'checkpoints'
  with contextlib.closing(Checkpointer(folder)) as checkpointer:
    step, stored = checkpointer.newest() or (0, {})
    resumption.check_same_text(stored, run.task, where=run.workdir)
    if old := _trained_config(run, stored):
      changes = resumption.check_same_run(
        old, run.config, step=step, where=run.workdir
      )
      if changes:
        metrics.say(f'{run.name or "train"}: continues with {changes}')
    checkpointer.check(params=steps.abstract_params(run.model)[1])
  return step


def _trained_config(run: Run, stored: dict) -> ExperimentConfig | None:
  """The config of a run's checkpoints; those of earlier versions lack it."""
  written = None
  with contextlib.suppress(FileNotFoundError):
    try:
      written = read_config(run.workdir)
    except DamagedFileError as error:
      if 'config' not in stored:
        raise
      metrics.say(f'{error}: it is written anew, as the checkpoints tell it')
  if 'config' not in stored:
    return written
  return config_lib.from_config_dict(ExperimentConfig, stored['config'])


def make_placement(
  config: ParallelConfig, seq_len: int, *, mesh: Mesh | None = None
) -> Placement | None:
  """Where sequences of a length lie; None for a mesh of one device.

  Args:
    config: of the mesh.
    seq_len: tokens of a sequence.
    mesh: of those sizes, of devices elsewhere; None: of those here.

  Raises:
    ValueError: there are fewer devices than the mesh has.
  """
  if mesh is None and config.devices == 1:
    return None
  if mesh is None:
    mesh = parallel.make_mesh(config.data, config.seq, config.model)
  axes = parallel.sequence_axes(config.scheme)
  shards = math.prod(mesh.shape[name] for name in axes)
  layout = SequenceLayout(config.layout, seq_len, shards)
  return Placement(mesh, layout, config.scheme)


def open_batches(
  config: ExperimentConfig,
  task: tasks.Task,
  split: str,
  *,
  placement: Placement | None = None,
) -> BatchIterator:
  """The batches of a split that a run reads, from the first one on.

  Args:
    config: of the run.
    task: of the run.
    split: 'train', 'validation' or 'test'.
    placement: decides which rows this process reads; None: all of them.

  Raises:
    ValueError: the task has no such examples, or data.directory lacks them.
  """
  batches = {
    'train': config.steps,
    'validation': config.eval.batches,
    'test': config.eval.test_batches,
  }
  training = split == 'train'
  rows = config.batch_size
  if not training:
    rows = config.eval.batch_size or rows
  index, count = (0, 1) if placement is None else placement.row_group()
  return make_iterator(
    task,
    split=split,
    batch_size=rows,
    seed=config.seed,
    workers=config.data.workers if training else 0,
    num_examples=batches[split] * rows,
    directory=config.data.directory,
    process_index=index,
    process_count=count,
  )
