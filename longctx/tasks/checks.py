"""Checks of a dataclass's fields: errors that say which to change, and how."""

from collections.abc import Collection
from typing import Annotated, Any

from longctx.typing import Between

# Tokens of an example, and of a vocabulary: block maps of longer ones, and
# permutations of larger ones, do not fit a host.
MOST = 2**24
Positive = Annotated[int, Between(1, MOST)]
Natural = Annotated[int, Between(0, MOST)]


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
