"""Claims of a study: a figure of each seed, whose median meets a bar.

accuracy = of('accuracy')
CLAIMS = {
  'attention answers': accuracy('full') >= 0.99,
  'and beats a window': accuracy('full') - accuracy('window') >= 0.1,
}
"""

import dataclasses
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# What a run measured, by its name: the rows of one seed.
Rows = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of a seed's runs; a comparison with a number makes it a claim.

  Attributes:
    read: of the rows of one seed; None where the run never got there, which
      counts as worse than any number.
  """

  read: Callable[[Rows], float | None]

  def __call__(self, rows: Rows) -> float | None:
    return self.read(rows)

  def __sub__(self, other: 'Figure') -> 'Figure':
    return self._with(other, operator.sub)

  def __truediv__(self, other: 'Figure') -> 'Figure':
    return self._with(other, operator.truediv)

  def _with(self, other: 'Figure', combine: Callable) -> 'Figure':
    def read(rows):
      pair = self(rows), other(rows)
      return None if None in pair else combine(*pair)

    return Figure(read)

  def __ge__(self, least: float) -> 'Claim':
    return Claim(self, '>=', least)

  def __le__(self, most: float) -> 'Claim':
    return Claim(self, '<=', most)


def of(key: str, prefix: str = '') -> Callable[[str], Figure]:
  """run -> the figure that its row has under a name."""
  return of_run(lambda row: row[key], prefix)


def of_run(
  read: Callable[[Mapping[str, Any]], float | None], prefix: str = ''
) -> Callable[[str], Figure]:
  """run -> the figure that a function makes of its row."""
  return lambda run: Figure(lambda rows: read(rows[prefix + run]))


def largest(figures: Iterable[Figure]) -> Figure:
  """The best of several runs."""
  figures = list(figures)
  return Figure(lambda rows: max(figure(rows) for figure in figures))


def least(figures: Iterable[Figure]) -> Figure:
  """The worst of several runs."""
  figures = list(figures)
  return Figure(lambda rows: min(figure(rows) for figure in figures))


@dataclasses.dataclass(frozen=True)
class Claim:
  """A figure and the bar that its median over seeds is to meet.

  Attributes:
    figure: of the rows of one seed.
    sign: '>=' or '<='.
    bar: the smallest or the largest median for which the claim holds.
  """

  figure: Figure
  sign: str
  bar: float

  def holds(self, figure: float | None) -> bool:
    compare = operator.ge if self.sign == '>=' else operator.le
    return figure is not None and compare(figure, self.bar)


def conclude(
  claims: Mapping[str, Claim],
  rows: Sequence[Mapping[str, Any]],
  *,
  command: str,
) -> list[dict[str, Any]]:
  """One entry per claim: what results.json holds.

  Args:
    claims: by what they say.
    rows: the lines of results.jsonl.
    command: that repeats all of it.

  Raises:
    ValueError: a claim is no more than a figure.
  """
  seeds = list(dict.fromkeys(row['seed'] for row in rows))
  by_seed = [
    {row['run']: row for row in rows if row['seed'] == seed} for seed in seeds
  ]
  shared = {
    'seeds': seeds,
    'command': command,
    'commit': ', '.join(dict.fromkeys(row['commit'] for row in rows)),
    'hardware': ', '.join(dict.fromkeys(row['hardware'] for row in rows)),
  }
  entries = []
  for text, claim in claims.items():
    if not isinstance(claim, Claim):
      raise ValueError(f'{text!r} needs a bar: compare it by >= or <=')
    found = spread(map(claim.figure, by_seed), high_is_good=claim.sign == '>=')
    entry = {'claim': text, 'figure': found['median']}
    entry |= {'low': found['low'], 'high': found['high']}
    entry |= {'bar': f'{claim.sign} {claim.bar:g}'}
    entry |= {'ok': claim.holds(found['median'])}
    entries.append(entry | shared)
  return entries


def spread(
  values: Iterable[float | None], *, high_is_good: bool = True
) -> dict[str, float | None]:
  """Median and range; None, of a run that never got there, is the worst."""
  values = list(values)
  reached = sorted(v for v in values if v is not None)
  missing = [None] * (len(values) - len(reached))
  if not missing:
    median = statistics.median(reached)
    return {'median': median, 'low': reached[0], 'high': reached[-1]}
  ordered = [*missing, *reached] if high_is_good else [*reached, *missing]
  # Of the two in the middle of an even number, the worse one.
  middle = (len(ordered) - high_is_good) // 2
  median = ordered[middle]
  return {'median': median, 'low': ordered[0], 'high': ordered[-1]}


def number(value: float | None) -> str:
  """As tables show it; 'never' where a run never got there."""
  if value is None:
    return 'never'
  if isinstance(value, int) or abs(value) >= 1000:
    return f'{value:,.0f}'
  return f'{value:.3f}' if value == 0 or abs(value) >= 0.01 else f'{value:.1g}'


def ranged(values: Iterable[float | None], digits: int = 3) -> str:
  """The median and the range of what there is, as in a cell of a table."""
  found = [value for value in values if value is not None]
  if not found:
    return '–'
  middle, low, high = (
    f'{value:.{digits}f}'
    for value in (statistics.median(found), min(found), max(found))
  )
  return f'{middle} ({low} to {high})'


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A table of cells."""
  lines = [f'| {" | ".join(map(str, row))} |' for row in (head, *rows)]
  return '\n'.join([lines[0], '|---' * len(head) + '|', *lines[1:]]) + '\n'


def table(claims: Sequence[Mapping[str, Any]]) -> str:
  """The claims as Markdown."""
  rows = []
  for entry in claims:
    middle, low, high = (number(entry[k]) for k in ('figure', 'low', 'high'))
    ok = 'yes' if entry['ok'] else '**no**'
    rows.append([entry['claim'], middle, f'{low} to {high}', entry['bar'], ok])
  return markdown(('claim', 'figure', 'range', 'bar', 'ok'), rows)


def failed(claims: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The claims that do not hold."""
  return [claim for claim in claims if not claim['ok']]
