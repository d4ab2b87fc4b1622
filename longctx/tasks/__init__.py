"""Synthetic tasks and text to train and measure models on, one file each.

task = make_task('mqar', num_pairs=8)
example = task.get(seed=0, split='train', index=7)
"""

import dataclasses
from typing import Any

from longctx.tasks.arithmetic import Arithmetic
from longctx.tasks.bigram_backcopy import BigramBackcopy
from longctx.tasks.bytes_lm import BytesLM
from longctx.tasks.copying import Copying
from longctx.tasks.induction import Induction
from longctx.tasks.markov import Markov
from longctx.tasks.mqar import MQAR
from longctx.tasks.multi_needle import MultiNeedle
from longctx.tasks.ngram_lookup import NgramLookup
from longctx.tasks.opinions import Opinions
from longctx.tasks.passkey import Passkey
from longctx.tasks.phone_book import PhoneBook
from longctx.tasks.selective_copying import SelectiveCopying
from longctx.tasks.stream_eval import StreamEval
from longctx.tasks.task import SPLITS, Example, Task
from longctx.tasks.text_lm import TextLM
from longctx.tasks.variable_tracking import VariableTracking
from longctx.typing import among, checked, field_types

TASKS = {
  'arithmetic': Arithmetic,
  'bigram_backcopy': BigramBackcopy,
  'bytes_lm': BytesLM,
  'copying': Copying,
  'induction': Induction,
  'markov': Markov,
  'mqar': MQAR,
  'multi_needle': MultiNeedle,
  'ngram_lookup': NgramLookup,
  'opinions': Opinions,
  'passkey': Passkey,
  'phone_book': PhoneBook,
  'selective_copying': SelectiveCopying,
  'stream_eval': StreamEval,
  'text_lm': TextLM,
  'variable_tracking': VariableTracking,
}

__all__ = [
  'SPLITS',
  'TASKS',
  'Example',
  'Task',
  'make_task',
  'task_defaults',
  'task_fields',
]


def make_task(name: str, **fields: Any) -> Task:
  """Makes a task by name.

  Raises:
    ValueError: unknown task or field, a value of the wrong type, or values that
      do not fit together.
  """
  defaults = task_defaults(name, **fields)
  del defaults['name']
  return TASKS[name](**defaults)


def task_defaults(name: str, **overrides: Any) -> dict[str, Any]:
  """All fields of a task with their values, and its name.

  A config lists them all, so that each can be set on the command line;
  `make_task(**task_defaults(...))` is the task.

  Raises:
    ValueError: unknown task, unknown field or a value of the wrong type.
  """
  if name not in list(TASKS):
    raise ValueError(f'unknown task {name!r}{among(name, sorted(TASKS))}')
  defaults = {f.name: f.default for f in dataclasses.fields(TASKS[name])}
  for key, value in overrides.items():
    if key not in defaults:
      raise ValueError(
        f'task {name!r} has no field {key!r}{among(key, defaults)}'
      )
    defaults[key] = checked(value, field_types(TASKS[name])[key], f'task.{key}')
  return {'name': name, **defaults}


def task_fields(task: Task) -> dict[str, Any]:
  """The name and fields that `make_task` would make this task from."""
  names = {cls: name for name, cls in TASKS.items()}
  return {'name': names[type(task)], **dataclasses.asdict(task)}
