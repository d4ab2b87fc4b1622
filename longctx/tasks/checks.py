"""Checks of a dataclass's fields: errors that say which to change, and how."""

from collections.abc import Collection
from typing import Any


def at_least(fields: Any, least: int, *names: str, prefix: str = '') -> None:
  """Refuses named fields that are smaller; 'eval.' may be a prefix of names."""
  for name in names:
    if (value := getattr(fields, name)) < least:
      raise ValueError(f'{prefix}{name}={value} must be at least {least}')


def not_negative(fields: Any, *names: str) -> None:
  """Refuses fields below 0, all of them in one line."""
  if any(getattr(fields, name) < 0 for name in names):
    raise ValueError(f'{_values(fields, names)} must not be negative')


def one_of(
  fields: Any, name: str, known: Collection[str], *, prefix: str = ''
) -> None:
  """Refuses a field that is none of some names."""
  if (value := getattr(fields, name)) not in known:
    raise ValueError(
      f'unknown {prefix}{name}={value!r}; known: {", ".join(known)}'
    )


def large_enough(fields: Any, name: str, least: int, *others: str) -> None:
  """Refuses a field that is too small for other fields, or for some words."""
  if (value := getattr(fields, name)) < least:
    too = 'too short' if name == 'seq_len' else 'too small'
    raise ValueError(
      f'{name}={value} is {too} for {_values(fields, others)}: it needs '
      f'{name} >= {least}'
    )


def _values(fields: Any, names: Collection[str]) -> str:
  """'a=1, b=2 and c=3', of fields; what is no field is given as it is."""
  words = [
    f'{name}={getattr(fields, name)}' if hasattr(fields, name) else name
    for name in names
  ]
  return ' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))
