"""Copying strings longer than those of training, and the bound on fixed states.

    python -m studies.copying.run
    python -m studies.copying.run --quick

'Repeat After Me' (Jelassi et al., 2024, arXiv:2402.01032): trained on strings
of up to 50 of 26 letters, tested on up to 1,000. One training per seed, of all
runs of config.py.
"""

import pathlib

from studies.claims import Figure, largest, of_run
from studies.common import Job, Study, main, read
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
  found = read(workdir, 'copies.json')
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


def letters(name: str, length: int, key: str = 'letters_right') -> Figure:
  """Share of letters that come out right."""
  return of_run(lambda row: row[key][row['lengths'].index(length)])(name)


def strings(name: str, length: int) -> Figure:
  """Share of whole strings that come out right."""
  return letters(name, length, 'strings_right')


def best(figure, names, length: int) -> Figure:
  return largest(figure(name, length) for name in names)


@Figure
def above_bound(rows) -> float:
  """The smallest distance of a measured error from its bound."""
  return min(
    1 - right - bound
    for name in FIXED_STATE
    for right, bound in zip(
      rows[name]['strings_right'], rows[name]['bound'], strict=True
    )
  )


@Figure
def bits_per_bit(rows) -> float:
  """State bits for each bit shown to be used; the best of the models."""
  return min(
    rows[name]['state_bits'] / max(rows[name]['effective_bits'], 1.0)
    for name in FIXED_STATE
  )


FULL = 'no_positions'
SCALABLE = ('no_positions', 'scaled')
# By letter, in context, where whole strings are not meant.
QUICK = {
  'attention without positions copies 50 letters': letters(FULL, 50) >= 0.99,
  'attention without positions copies 200 letters': letters(FULL, 200) >= 0.9,
}
CLAIMS = {
  'without positions: 1,000 letters': best(letters, SCALABLE, 1000) >= 0.9,
  'without positions: strings of 200': best(strings, SCALABLE, 200) >= 0.9,
  'attention with RoPE copies 50 letters too': letters('rope', 50) >= 0.95,
  'attention with RoPE does not copy 200': letters('rope', 200) <= 0.5,
  'a window of 64 copies 50 letters': letters('window', 50) >= 0.95,
  'DeltaNet copies 35 letters': letters('deltanet', 35) >= 0.85,
  'no fixed state copies 200 letters': best(letters, FIXED_STATE, 200) <= 0.5,
  'no fixed state: strings of 100': best(strings, FIXED_STATE, 100) <= 0.01,
  'whole-string errors above the proven bound, the closest': above_bound >= 0,
  'state bits per bit that copying shows to be used': bits_per_bit >= 1.0,
}

STUDY = Study(
  name='copying',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  quick=QUICK,
  show=plot.show,
)

if __name__ == '__main__':
  main(STUDY)
