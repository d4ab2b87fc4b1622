"""What a study asserts, held against what its runs measured."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# What a run measured, by its name: the rows of one seed.
Rows = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """What a study asserts: a figure of each seed, whose median meets a bar.

  Attributes:
    text: what is claimed; the bar stands beside it.
    figure: of the rows of one seed; None where the run never got there, which
      counts as worse than any number.
    at_least: smallest median for which the claim holds.
    at_most: largest one; exactly one of both is given.
    quick: whether the claim is to hold with --quick too.
  """

  text: str
  figure: Callable[[Rows], float | None]
  at_least: float | None = None
  at_most: float | None = None
  quick: bool = False

  def __post_init__(self):
    if (self.at_least is None) == (self.at_most is None):
      raise ValueError(
        f'{self.text!r} needs either at_least or at_most, got '
        f'{self.at_least=} and {self.at_most=}'
      )

  @property
  def bar(self) -> str:
    if self.at_least is not None:
      return f'>= {self.at_least:g}'
    return f'<= {self.at_most:g}'

  def holds(self, figure: float | None) -> bool:
    if figure is None:
      return False
    if self.at_least is not None:
      return figure >= self.at_least
    return figure <= self.at_most


def conclude(
  claims: Iterable[Claim],
  rows: Sequence[Mapping[str, Any]],
  *,
  command: str,
  quick: bool = False,
) -> list[dict[str, Any]]:
  """One entry per claim: what results.json holds.

  Args:
    claims: of the study.
    rows: the lines of results.jsonl.
    command: that repeats all of it.
    quick: whether the size is reduced: only claims made for it are concluded.
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
  for claim in claims:
    if quick and not claim.quick:
      continue
    least = claim.at_least is not None
    found = spread([claim.figure(one) for one in by_seed], high_is_good=least)
    entry = {'claim': claim.text, 'figure': found['median']}
    entry |= {'low': found['low'], 'high': found['high'], 'bar': claim.bar}
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


def ranged(values: Sequence[float]) -> str:
  """The median and the range, as in a cell of a table."""
  middle = statistics.median(values)
  return f'{middle:.3f} ({min(values):.3f} to {max(values):.3f})'


def table(claims: Sequence[Mapping[str, Any]]) -> str:
  """The claims as Markdown."""
  lines = ['| claim | figure | range | bar | ok |', '|---|---|---|---|---|']
  for entry in claims:
    ok = 'yes' if entry['ok'] else '**no**'
    low, high = number(entry['low']), number(entry['high'])
    lines.append(
      f'| {entry["claim"]} | {number(entry["figure"])} | {low} to {high} | '
      f'{entry["bar"]} | {ok} |'
    )
  return '\n'.join(lines) + '\n'


def failed(claims: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The claims that do not hold."""
  return [claim for claim in claims if not claim['ok']]
