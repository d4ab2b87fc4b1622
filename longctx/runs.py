"""The runs of an experiment: checked as far as that goes without compiling."""

import dataclasses
import json
import os
import pathlib

import jax

from longctx import config as config_lib
from longctx import metrics, steps, tasks
from longctx.checkpoint import Checkpointer
from longctx.config import ExperimentConfig
from longctx.data import BatchIterator, make_iterator
from longctx.model import TransformerConfig, validate

# What a run may change between two starts: nothing that moves a parameter.
FREE_KEYS = (
  'steps',
  'eval.',
  'checkpoint.',
  'log.',
  'data.',
  'model.logits_chunk',
  'model.remat',
  'model.implementation',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training: `name` is '' for the only run of an experiment."""

  name: str
  config: ExperimentConfig
  task: tasks.Task
  model: TransformerConfig
  workdir: pathlib.Path


def resolve_model(
  model: TransformerConfig, task: tasks.Task
) -> TransformerConfig:
  """Takes from the task what the model leaves open."""
  return dataclasses.replace(
    model,
    vocab_size=model.vocab_size or task.vocab_size,
    max_positions=model.max_positions or task.seq_len,
  )


def prepare(config: ExperimentConfig, workdir: pathlib.Path) -> list[Run]:
  """Checks everything that can be checked before anything compiles.

  Raises:
    ValueError, NotImplementedError: a config that cannot work.
    OSError: a workdir that cannot be used.
    CheckpointError: the workdir holds checkpoints of another model.
  """
  runs = []
  for name, one in config_lib.expand_runs(config).items():
    task = tasks.make_task(**one.task)
    model = resolve_model(one.model, task)
    if model.vocab_size < task.vocab_size:
      raise ValueError(
        f'model.vocab_size={model.vocab_size} is too small for the task, which '
        f'needs {task.vocab_size}'
      )
    validate(model, task.seq_len)
    for split in tasks.SPLITS:
      open_batches(one, task, split).close()
    if one.log.tensorboard:
      metrics.make_summary_writer()
    runs.append(
      Run(
        name=name,
        config=one,
        task=task,
        model=model,
        workdir=workdir / name,
      )
    )
  for run in runs:
    run.workdir.mkdir(parents=True, exist_ok=True)
    _check_workdir(run)
  metrics.write_json(workdir / 'config.json', config_lib.to_dict(config))
  metrics.write_json(workdir / 'versions.json', metrics.versions())
  return runs


def _check_workdir(run: Run):
  """Refuses a folder that holds another run's checkpoints."""
  for path in (run.workdir, *run.workdir.glob('*')):
    if not os.access(path, os.R_OK | os.W_OK):
      raise PermissionError(13, 'cannot be read and written', str(path))
  if not (run.workdir / 'checkpoints').exists():
    return
  checkpointer = Checkpointer(run.workdir / 'checkpoints')
  params = steps.abstract_params(run.model)[1]
  checkpointer.check(params=params)
  finished = checkpointer.steps()
  checkpointer.close()
  if finished and (run.workdir / 'config.json').exists():
    _check_same_config(run)


def _check_same_config(run: Run):
  path = run.workdir / 'config.json'
  old = config_lib.from_config_dict(
    ExperimentConfig, json.loads(path.read_text())
  )
  changed = [
    line
    for line in config_lib.differences(
      config_lib.to_dict(old), config_lib.to_dict(run.config)
    )
    if not line.startswith(FREE_KEYS)
  ]
  if changed:
    raise ValueError(
      f'{run.workdir} holds checkpoints of a run with another config '
      f'({"; ".join(changed[:3])}): give another --workdir, or delete it'
    )


def open_batches(
  config: ExperimentConfig, task: tasks.Task, split: str
) -> BatchIterator:
  """The batches of a split that a run reads, from the first one on.

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
  return make_iterator(
    task,
    split=split,
    batch_size=rows,
    seed=config.seed,
    workers=config.data.workers if training else 0,
    num_examples=batches[split] * rows,
    directory=config.data.directory,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
