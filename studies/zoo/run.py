"""Trains every variant on MQAR from several seeds: medians and ranges.

    python -m studies.zoo.run
    python -m studies.zoo.run --quick

Each seed is one run of configs/zoo.py, about 20 minutes on two CPU cores;
--quick trains two variants alone. Writes table.md, the table of the README, and
variants.json, from which zoo.png is drawn.
"""

import json
import pathlib

from longctx.training import log_files
from studies.claims import of, spread
from studies.common import Job, Study, by_run, main, read
from studies.zoo import plot

MEASURED = ('accuracy', 'steps_to_90', 'tokens_per_second')
SHARED = ('parameters', 'state_bytes', 'chance', 'steps', 'commit', 'command')


def jobs(seed: int, quick: bool) -> list[Job]:
  config = 'configs/zoo.py' + ':full,linear' * quick
  return [Job(run='zoo', seed=seed, config=config)]


def measure(job: Job, workdir: pathlib.Path) -> list[dict]:
  return [{'run': name, **found} for name, found in read(workdir).items()]


accuracy = of('accuracy')
QUICK = {
  '`full` answers after 400 steps': accuracy('full') >= 0.99,
  '`linear` over elu + 1 does not': accuracy('linear') <= 0.3,
}
CLAIMS = {
  '`softpick`, which needs no sink, answers too': accuracy('softpick') >= 0.99,
  '`based` answers nearly all': accuracy('based') >= 0.95,
  '`deltanet` answers most': accuracy('deltanet') >= 0.9,
  'a window of 16 answers less than half': accuracy('sliding_window') <= 0.5,
}


def by_variant(rows) -> list[dict]:
  """One entry per variant over the seeds, best first."""
  entries = []
  for name, found in by_run(rows).items():
    entry = {'variant': name}
    for key in MEASURED:
      good = key != 'steps_to_90'
      entry[key] = spread([row[key] for row in found], high_is_good=good)
    entry |= {key: found[0][key] for key in SHARED}
    entries.append(entry | {'seeds': [row['seed'] for row in found]})
  return sorted(entries, key=lambda e: -e['accuracy']['median'])


def show(rows, folder: pathlib.Path):
  # The lines of each seed were not kept when what is committed was measured.
  path = folder / 'variants.json'
  if rows:
    log_files.write_json(path, by_variant(rows))
  plot.show(json.loads(path.read_text()), folder)


STUDY = Study(
  name='zoo',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  quick=QUICK,
  show=show,
)

if __name__ == '__main__':
  main(STUDY)
