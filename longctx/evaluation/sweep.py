"""Evaluation sweep of a trained workdir, over a parameter of its task."""

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from longctx import tasks
from longctx.data.pipeline import make_iterator
from longctx.models import gate, validate
from longctx.training import config as config_lib
from longctx.training import figures, metrics, steps
from longctx.training.checkpoint import Checkpointer
from longctx.training.config import ExperimentConfig
from longctx.training.errors import CheckpointError, DamagedFileError
from longctx.training.log_files import JsonLog
from longctx.training.progress import Progress
from longctx.training.runs import (
  Run,
  make_placement,
  read_config,
  resolve_model,
  with_own_tokenizer,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """Sweep of a task's field over values, in order.

  Attributes:
    parameter: name of the field; '' measures the task as trained.
    values: what it is set to, one measurement each.
  """

  parameter: str
  values: tuple[Any, ...]


def parse_sweep(text: str) -> Sweep:
  """Reads 'seq_len=64,128,256'; '' stands for the task as it was trained.

  Raises:
    ValueError: it is not of that form.
  """
  if not text:
    return Sweep(parameter='', values=(None,))
  parameter, equals, values = text.partition('=')
  try:
    parsed = tuple(json.loads(f'[{values}]'))
  except json.JSONDecodeError:
    parsed = tuple(values.split(','))
  if not (parameter and equals and parsed):
    raise ValueError(f'--task.{text} must be like --task.seq_len=64,128,256')
  return Sweep(parameter=parameter, values=parsed)


def open_workdir(workdir: pathlib.Path) -> list[Run]:
  """The runs of a workdir: itself, or its named runs.

  Raises:
    ValueError: it is no workdir, or holds no checkpoint.
    OSError: it cannot be read.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise ValueError(f'{workdir} is no workdir of train.py: no config.json')
  try:
    config = read_config(workdir)
  except DamagedFileError as error:
    raise DamagedFileError(
      f"{error}: run train.py's command again, which writes it anew"
    ) from error
  if not os.access(workdir, os.W_OK):
    raise PermissionError(13, 'cannot be written', str(workdir))
  found = []
  for name, one in config_lib.expand_runs(config).items():
    folder = workdir / name
    if not any((folder / 'checkpoints').glob('[0-9]*')):
      raise ValueError(f'there is no checkpoint in {folder}: train it first')
    task = tasks.make_task(**with_own_tokenizer(one.task, folder))
    model = resolve_model(one.model, task)
    found.append(
      Run(name=name, config=one, task=task, model=model, workdir=folder)
    )
  return found


def choose(runs: list[Run], name: str) -> Run:
  """The run of that name; of a single run, '' is enough.

  Raises:
    ValueError: no run has that name.
  """
  names = [run.name for run in runs]
  if len(runs) > 1 and not name:
    raise ValueError(f'--run is missing: one of {", ".join(names)}')
  if name and name not in names:
    raise ValueError(f'there is no run {name!r}; known: {", ".join(names)}')
  return runs[names.index(name) if name else 0]


def swept_tasks(
  run: Run, sweep: Sweep, *, batch_size: int = 0
) -> list[tasks.Task]:
  """The task at each value, each checked against the trained model.

  Args:
    run: from `open_workdir`.
    sweep: what changes.
    batch_size: rows of a batch; 0 takes the one of the run's validation.

  Raises:
    ValueError, NotImplementedError: a value that the task does not take, or at
      which the model cannot run (learned positions have a length).
  """
  if not sweep.parameter:
    return [run.task]
  if sweep.parameter in ('name', 'tokenizer'):
    raise ValueError(
      'a sweep changes a field of the task, not the task or its tokens'
    )
  found = []
  for value in sweep.values:
    fields = {**tasks.task_fields(run.task), sweep.parameter: value}
    task = tasks.make_task(**fields)
    if task.vocab_size > run.model.vocab_size:
      raise ValueError(
        f'{sweep.parameter}={value} needs {task.vocab_size} tokens, and the '
        f'model knows {run.model.vocab_size}'
      )
    placement = make_placement(run.config.parallel, task.seq_len)
    validate(
      run.model,
      task.seq_len,
      batch_size=_rows(run.config, batch_size),
      placement=placement,
    )
    found.append(task)
  return found


def evaluate(
  runs: list[Run],
  workdir: pathlib.Path,
  *,
  sweep: Sweep,
  split: str = 'test',
  batches: int = 16,
  batch_size: int = 0,
) -> list[dict[str, Any]]:
  """Measures every run at every value, and writes eval.jsonl and a picture.

  A value is written when it is measured, and not measured again.

  Args:
    runs: from `open_workdir`.
    workdir: where eval.jsonl and figures/ go.
    sweep: what changes.
    split: of the task; 'test' shares no example with training.
    batches: measured at each value.
    batch_size: rows of a batch; 0 takes the one of the run's validation.

  Returns:
    The lines of eval.jsonl, one per run and value: parameter, value, accuracy
    with its 95% interval (low, high), loss (nats), count of scored tokens,
    examples; of a gate, precision and recall of the relevant tokens.
  """
  rows = []
  log = JsonLog(workdir / 'eval.jsonl', keys=('run', 'parameter', 'value'))
  before = log.rows()
  total = len(runs) * len(sweep.values) * batches
  with Progress('eval', total, unit='batch') as progress:
    for run in runs:
      measure = _Measure(run, progress)
      values = swept_tasks(run, sweep, batch_size=batch_size)
      for value, task in zip(sweep.values, values, strict=True):
        head = {
          'run': run.name,
          'parameter': sweep.parameter,
          'value': value,
          'split': split,
          'batches': batches,
          'batch_size': _rows(run.config, batch_size),
          **identity(run, measure.learned),
        }
        row, again = find_line(before, head), True
        if row is None:
          row, again = {**head, **measure(task, head)}, False
          log.append(row)
        else:
          progress.advance(batches)
        rows.append(row)
        metrics.say(_line(row) + ', as measured before' * again)
  numbers = all(isinstance(value, (int, float)) for value in sweep.values)
  if sweep.parameter and numbers:
    path = workdir / 'figures' / f'{sweep.parameter}.png'
    figures.sweep(
      path,
      {run.name: [r for r in rows if r['run'] == run.name] for run in runs},
      parameter=sweep.parameter,
      trained_at=runs[0].config.task[sweep.parameter],
      title=figures.describe(runs[0].config.task, (run.model for run in runs)),
    )
    metrics.say(f'figure: {path}')
  return rows


def _rows(config: ExperimentConfig, batch_size: int) -> int:
  return batch_size or config.eval.batch_size or config.batch_size


def _line(row: dict[str, Any]) -> str:
  head = f'{row["run"]} ' if row['run'] else ''
  if row['parameter']:
    head += f'{row["parameter"]}={row["value"]} '
  bits = row.get('bits_per_byte')
  bits = '' if bits is None else f'{bits:.4f} bits per byte '
  return (
    f'{head}accuracy {row["accuracy"]:.4f} [{row["low"]:.4f}, '
    f'{row["high"]:.4f}] loss {row["loss"]:.4f} {bits}'
    f'(chance {row["chance"]:.4f}, {row["count"]:,} answers)'
  )


def find_line(
  rows: list[dict[str, Any]], head: dict[str, Any]
) -> dict[str, Any] | None:
  """The last line that begins so: the measurement with these settings."""
  head = json.loads(json.dumps(head))
  found = [r for r in rows if {key: r.get(key) for key in head} == head]
  return found[-1] if found else None


class Parameters(NamedTuple):
  """Run parameters: `nnx.merge(graph, params)` is the model."""

  graph: nnx.GraphDef
  params: Any
  step: int
  digest: str


def restore(
  run: Run, step: int | None = None, *, compare_text: bool = True
) -> Parameters:
  """Reads a checkpoint of a run, the last one where no step is given.

  Args:
    run: from `open_workdir`.
    step: of the checkpoint.
    compare_text: say where the task's text has changed, which reads all of it.

  Raises:
    CheckpointError: there is none that can be read, or none of that step.
  """
  graph, params = steps.abstract_params(run.model)
  checkpointer = Checkpointer(run.workdir / 'checkpoints', say=metrics.say)
  try:
    restored = checkpointer.restore(params=params, step=step)
  finally:
    checkpointer.close()
  if restored is None:
    raise CheckpointError(f'there is no checkpoint in {run.workdir}')
  text = restored.meta.get('text')
  if compare_text and text is not None and text != run.task.text_digest:
    metrics.say(
      f'the text of the task has changed since {run.workdir} was trained on it'
    )
  return Parameters(graph, restored.params, restored.step, restored.digest)


def identity(run: Run, learned: Parameters) -> dict[str, Any]:
  """What tells measurements of a model on a text from those of others."""
  return {
    'step': learned.step,
    'params': learned.digest,
    'text': run.task.text_digest,
  }


class _Measure:
  """Measurement of one run, by its trained parameters."""

  def __init__(self, run: Run, progress: Progress):
    self._run, self._progress = run, progress
    self.learned = restore(run)
    self._evaluate = {}

  def __call__(self, task: tasks.Task, head: dict[str, Any]) -> dict[str, Any]:
    config, batch_size = self._run.config, head['batch_size']
    # On the mesh that the run was trained on, in a layout of this length.
    placement = make_placement(config.parallel, task.seq_len)
    # Kept by length, since values of other fields need no new program.
    activity = ''
    if task.seq_len not in self._evaluate:
      activity = 'compiling'
      self._evaluate[task.seq_len] = steps.make_steps(
        self.learned.graph,
        config,
        placement=placement,
        byte_counts=task.byte_counts,
      ).evaluate
    measure = self._evaluate[task.seq_len]
    iterator = make_iterator(
      task,
      split=head['split'],
      batch_size=batch_size,
      seed=config.seed,
      num_examples=head['batches'] * batch_size,
    )
    params, step = self.learned.params, np.int32(self.learned.step)
    try:
      placed = (
        steps.put(steps.with_query_indices(batch), placement)
        for batch in iterator
      )
      sums = []
      for batch in placed:
        with self._progress.doing(activity):
          sums.append(jax.device_get(measure(params, batch, step)))
        self._progress.advance()
        activity = ''
    finally:
      iterator.close()
    loss, weight, correct = (
      np.array([s[key] for s in sums], np.float64)
      for key in ('loss', 'weight', 'correct')
    )
    examples = head['batches'] * batch_size
    low, high = metrics.accuracy_interval(correct, weight, examples)
    total = max(weight.sum(), 1e-9)
    kept = {key: sum(float(s[key]) for s in sums) for key in sums[0]}
    return {
      **gate.shares(kept),
      'accuracy': float(correct.sum() / total),
      'low': low,
      'high': high,
      'loss': float(loss.sum() / total),
      **metrics.bits_per_byte(kept),
      'count': int(weight.sum()),
      'examples': examples,
      'chance': task.chance,
      'ceiling': task.ceiling,
    }
