"""Resumption of a run: what may change between two starts, and what may not."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from longctx.tasks import Task
from longctx.training import config as config_lib
from longctx.training.config import ExperimentConfig

# What a run may change between two starts, for it moves no parameter.
FREE_KEYS = ('steps', 'eval.', 'checkpoint.', 'log.', 'analysis.', 'data.')
# Likewise, but for the order in which numbers are summed.
ROUNDING_KEYS = (
  'model.logits_chunk',
  'model.remat',
  'model.implementation',
  'parallel.',
)


def check_same_run(
  old: ExperimentConfig, new: ExperimentConfig, *, step: int, where: object
) -> str:
  """Refuses a config by which a run cannot go on.

  Args:
    old: what it was trained by.
    new: what it is to go on by.
    step: updates made so far.
    where: of the run, for the message.

  Returns:
    What changes all the same, in a line; '' where nothing does.

  Raises:
    ValueError: other parameters would come out; or the run is farther.
  """
  found = config_lib.differences(_comparable(old), _comparable(new))
  free = [line for line in found if line.startswith(FREE_KEYS)]
  rounding = [line for line in found if line.startswith(ROUNDING_KEYS)]
  refused = [line for line in found if line not in free + rounding]
  # The end of a schedule differs with the steps alone.
  schedule = 'optimizer.schedule_steps'
  if step > new.steps and all(x.startswith(schedule) for x in refused):
    raise ValueError(
      f'{where} is at step {step}, which is beyond steps={new.steps}: take '
      f'steps={step} or more, or another --workdir'
    )
  if refused:
    horizon = old.optimizer.end_of_schedule(old.steps)
    hint = ''
    if horizon != new.optimizer.end_of_schedule(new.steps):
      refused += [line for line in free if line.startswith('steps')]
      hint = f'optimizer.schedule_steps={horizon} keeps the schedule; '
    raise ValueError(
      f'{where} holds checkpoints of a run with another config '
      f'({"; ".join(refused)}): {hint}give another --workdir, or delete it'
    )
  if rounding:
    free.append(f'{"; ".join(rounding)} (the same up to the order of sums)')
  return '; '.join(free)


def _comparable(config: ExperimentConfig) -> dict[str, Any]:
  """The config with the end of its schedule in place of what decides it."""
  horizon = config.optimizer.end_of_schedule(config.steps)
  optimizer = dataclasses.replace(config.optimizer, schedule_steps=horizon)
  return config_lib.to_dict(dataclasses.replace(config, optimizer=optimizer))


def check_same_text(stored: Mapping[str, Any], task: Task, *, where: object):
  """Refuses a text that is not the one that a checkpoint was trained on."""
  # Checkpoints of earlier versions do not tell.
  if stored.get('text', task.text_digest) != task.text_digest:
    raise ValueError(
      f'the text of the task has changed since {where} was trained on it '
      f'(digest {stored["text"]} there, {task.text_digest} now): restore it, '
      'or give another --workdir'
    )
