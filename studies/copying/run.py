"""Copying strings longer than those of training, and the bound on fixed states.

    python -m studies.copying.run
    python -m studies.copying.run --quick

'Repeat After Me' (Jelassi et al., 2024, arXiv:2402.01032): trained on strings
of up to 50 of 26 letters, tested on up to 1,000. One training per seed, of all
runs of config.py.
"""

import json
import pathlib

from studies.common import Claim, Job, Study, main
from studies.copying import plot
from studies.copying.bound import effective_bits, least_error
from studies.copying.config import FIXED_STATE

CONFIG = 'studies/copying/config.py'


def jobs(seed: int, quick: bool) -> list[Job]:
  measure = ('-m', 'studies.copying.measure', '--workdir={workdir}')
  if quick:
    return [
      Job(
        run='copying',
        seed=seed,
        config=f'{CONFIG}:no_positions',
        then=((*measure, '--longest=200', '--strings=16'),),
      )
    ]
  return [Job(run='copying', seed=seed, config=CONFIG, then=(measure,))]


def measure(job: Job, workdir: pathlib.Path) -> list[dict]:
  found = json.loads((workdir / 'copies.json').read_text())
  rows = []
  for name, one in found.items():
    row = {'run': name, **one}
    if name in FIXED_STATE:
      # A state at its largest, as after a long string.
      bits = 8 * max(one['state_bytes'])
      row['state_bits'] = bits
      row['bound'] = [least_error(bits, n) for n in one['lengths']]
      row['effective_bits'] = effective_bits(
        one['lengths'], one['strings_right']
      )
    rows.append(row)
  return rows


def letters(name: str, length: int):
  """Share of letters that come out right."""

  def figure(rows):
    row = rows[name]
    return row['letters_right'][row['lengths'].index(length)]

  return figure


def strings(name: str, length: int):
  """Share of whole strings that come out right."""

  def figure(rows):
    row = rows[name]
    return row['strings_right'][row['lengths'].index(length)]

  return figure


def best(figure, names, length: int):
  return lambda rows: max(figure(name, length)(rows) for name in names)


def above_bound(rows) -> float:
  """The smallest distance of a measured error from its bound."""
  return min(
    1 - right - bound
    for name in FIXED_STATE
    for right, bound in zip(
      rows[name]['strings_right'], rows[name]['bound'], strict=True
    )
  )


def bits_per_bit(rows) -> float:
  """State bits for each bit shown to be used; the best of the models."""
  return min(
    rows[name]['state_bits'] / max(rows[name]['effective_bits'], 1.0)
    for name in FIXED_STATE
  )


SCALABLE = ('no_positions', 'scaled')

CLAIMS = (
  Claim(
    text='full attention without positions copies 50 letters, by letter',
    figure=letters('no_positions', 50),
    at_least=0.99,
    quick=True,
  ),
  Claim(
    text='full attention without positions copies 200 letters, by letter',
    figure=letters('no_positions', 200),
    at_least=0.9,
    quick=True,
  ),
  Claim(
    text='attention without positions copies 1,000 letters, by letter',
    figure=best(letters, SCALABLE, 1000),
    at_least=0.9,
  ),
  Claim(
    text='attention without positions copies 200 letters, whole strings',
    figure=best(strings, SCALABLE, 200),
    at_least=0.9,
  ),
  Claim(
    text='attention with RoPE copies 50 letters as well, by letter',
    figure=letters('rope', 50),
    at_least=0.95,
  ),
  Claim(
    text='attention with RoPE does not copy 200 letters, by letter',
    figure=letters('rope', 200),
    at_most=0.5,
  ),
  Claim(
    text='a window of 64 copies 50 letters, by letter',
    figure=letters('window', 50),
    at_least=0.95,
  ),
  Claim(
    text='DeltaNet copies 35 letters, by letter',
    figure=letters('deltanet', 35),
    at_least=0.85,
  ),
  Claim(
    text='no model of fixed state copies 200 letters, best one, by letter',
    figure=best(letters, FIXED_STATE, 200),
    at_most=0.5,
  ),
  Claim(
    text='no model of fixed state copies 100 letters, best one, whole strings',
    figure=best(strings, FIXED_STATE, 100),
    at_most=0.01,
  ),
  Claim(
    text='whole-string errors above the bound, as is proven, the closest one',
    figure=above_bound,
    at_least=0.0,
  ),
  Claim(
    text='state bits per bit that copying shows to be used, the fewest',
    figure=bits_per_bit,
    at_least=1.0,
  ),
)

STUDY = Study(
  name='copying',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  show=plot.show,
)

if __name__ == '__main__':
  main(STUDY)
