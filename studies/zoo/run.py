"""Trains every variant on MQAR from several seeds: medians and ranges.

    python -m studies.zoo.run
    python -m studies.zoo.run --quick

Each seed is one run of configs/zoo.py, about 20 minutes on two CPU cores;
--quick trains two variants alone. Writes table.md, the table of the README,
too.
"""

import json
import pathlib

from studies.common import Claim, Job, Study, main, number, spread

MEASURED = ('accuracy', 'steps_to_90', 'tokens_per_second')


def jobs(seed: int, quick: bool) -> list[Job]:
  config = 'configs/zoo.py' + ':full,linear' * quick
  return [Job(run='zoo', seed=seed, config=config)]


def measure(job: Job, workdir: pathlib.Path) -> list[dict]:
  found = json.loads((workdir / 'results.json').read_text())
  return [{'run': name, **results} for name, results in found.items()]


def accuracy(variant: str):
  return lambda rows: rows[variant]['accuracy']


CLAIMS = (
  Claim(
    text='`full` answers after 400 steps',
    figure=accuracy('full'),
    at_least=0.99,
    quick=True,
  ),
  Claim(
    text='`softpick`, which needs no sink, answers as well',
    figure=accuracy('softpick'),
    at_least=0.99,
  ),
  Claim(
    text='`based` answers nearly all', figure=accuracy('based'), at_least=0.95
  ),
  Claim(
    text='`deltanet` answers most', figure=accuracy('deltanet'), at_least=0.9
  ),
  Claim(
    text='`linear` over elu + 1 does not',
    figure=accuracy('linear'),
    at_most=0.3,
    quick=True,
  ),
  Claim(
    text='a window of 16 answers less than half',
    figure=accuracy('sliding_window'),
    at_most=0.5,
  ),
)


def by_variant(rows) -> list[dict]:
  """One entry per variant over the seeds, best first."""
  entries = []
  for name in dict.fromkeys(row['run'] for row in rows):
    found = [row for row in rows if row['run'] == name]
    entry = {'variant': name, **found[0]}
    entry |= {
      key: spread([one[key] for one in found], high_is_good=key == 'accuracy')
      for key in MEASURED
    }
    entries.append(entry)
  return sorted(entries, key=lambda e: -e['accuracy']['median'])


def table(entries) -> str:
  """Markdown."""
  lines = [
    '| variant | accuracy | to 90% | parameters | state bytes | tokens/s |',
    '|---|---|---|---|---|---|',
  ]
  for entry in entries:
    accuracy, steps = entry['accuracy'], entry['steps_to_90']
    never = lambda step: 'never' if step is None else f'{step:.0f}'
    reached = f'{never(steps["median"])} ({never(steps["low"])} to '
    reached += f'{never(steps["high"])})'
    if steps['low'] is None:
      reached = 'never'
    lines.append(
      f'| `{entry["variant"]}` | {number(accuracy["median"])} '
      f'({number(accuracy["low"])} to {number(accuracy["high"])}) | '
      f'{reached} | {entry["parameters"]:,} | '
      f'{entry["state_bytes"]:,} | '
      f'{entry["tokens_per_second"]["median"]:,.0f} |'
    )
  return '\n'.join(lines) + '\n'


def show(rows, folder: pathlib.Path):
  (folder / 'table.md').write_text(table(by_variant(rows)))


STUDY = Study(
  name='zoo',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  show=show,
)

if __name__ == '__main__':
  main(STUDY)
