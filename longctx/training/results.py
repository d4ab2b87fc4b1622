"""Results of finished runs: results.json, and a table of runs."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from longctx.tasks import Task
from longctx.training import metrics, phase
from longctx.training.errors import DamagedFileError
from longctx.training.log_files import read_json

# Accuracy, as a share of the ceiling, whose step is told: tasks are learned in
# jumps, so the step says more than the accuracy on either side of it.
LEARNED = 0.9


def summary(
  rows: Iterable[Mapping[str, Any]],
  test: Mapping[str, float],
  *,
  task: Task,
  steps: int,
  step_tokens: int,
  parameters: int,
  state_bytes: int,
  seconds: float,
  seed: int,
) -> dict[str, Any]:
  """What results.json holds.

  Args:
    rows: the lines of metrics.jsonl.
    test: loss (nats) and accuracy on the test split.
    steps: updates made.
    step_tokens: tokens of an update.
    state_bytes: what decoding keeps of a sequence as long as the task's.

  Returns:
    Those, and
    `steps_to_90`: the first validation at which the accuracy was 90% of the
      ceiling, None if it never was;
    `phase_change`: the largest change of the validation accuracy, see
      `phase.estimate_change`, None if there was none;
    `tokens_per_second`: the median of the lines, None where none has a rate;
    `analysis_share`: time spent on analyses for the time spent on updates, from
      the median of each, so without compilations; None without analyses.
  """
  rows = list(rows)
  rates = [r['tokens_per_second'] for r in rows if r['split'] == 'train']
  # Lines whose steps all follow a pause have no rate.
  rates = [r for r in rates if r]
  rate = float(np.median(rates)) if rates else None
  analyses = [r['seconds'] for r in rows if r['split'] == 'analysis']
  validations = [r for r in rows if r['split'] == 'validation']
  # Lines that were damaged are missing.
  last = validations[-1] if validations else {}
  learned = (
    r['step'] for r in validations if r['accuracy'] >= LEARNED * task.ceiling
  )
  change = phase.estimate_change(
    [r['step'] for r in validations], [r['accuracy'] for r in validations]
  )
  share = None
  if analyses and rate:
    spent = len(analyses) * float(np.median(analyses))
    share = spent * rate / (steps * step_tokens)
  return {
    'split': 'test',
    **test,
    'bits_per_token': test['loss'] / math.log(2),
    'chance': task.chance,
    'ceiling': task.ceiling,
    'validation_accuracy': last.get('accuracy'),
    'validation_loss': last.get('loss'),
    'steps': steps,
    'steps_to_90': next(learned, None),
    'phase_change': change and dataclasses.asdict(change),
    'parameters': parameters,
    'state_bytes': state_bytes,
    'tokens_per_second': rate,
    'seconds': seconds,
    'analysis_share': share,
    'seed': seed,
  }


def read_finished(path: pathlib.Path, step: int) -> dict[str, Any] | None:
  """What results.json holds of a run of so many steps, if it is whole."""
  try:
    results = read_json(path)
    return results if results['steps'] == step else None
  except FileNotFoundError:
    return None
  except (DamagedFileError, KeyError, TypeError) as error:
    why = error if isinstance(error, DamagedFileError) else f'{path} is damaged'
    metrics.say(f'{why}: it is computed again')
    return None


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """The runs side by side, on the test split, chance and ceiling beside."""
  columns = {
    'accuracy': '.4f',
    'chance': '.4f',
    'ceiling': '.4f',
    'loss': '.4f',
    'steps_to_90': ',',
    'parameters': ',',
    'state_bytes': ',',
    'tokens_per_second': ',.0f',
    'seconds': '.0f',
  }
  titles = {'tokens_per_second': 'tokens/s', 'steps_to_90': 'to 90%'}
  cells = [['run', *(titles.get(c, c.replace('_', ' ')) for c in columns)]]
  for name, row in results.items():
    values = ((row.get(column), how) for column, how in columns.items())
    shown = (
      '-' if value is None else f'{value:{how}}' for value, how in values
    )
    cells.append([name or 'train', *shown])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if index else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in cells
  )
