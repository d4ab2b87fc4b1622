"""Attention sinks in a model of bytes: what a stream loses without them.

    python -m studies.streaming.run
    python -m studies.streaming.run --quick

Trains configs/streaming.py from each seed, then reads the test split by
`studies.streaming.measure`: a short stream under every policy, each token of it
scored, and for seed 0 an endless one under `sinks`. Writes table.md and
streams.png too.
"""

import pathlib

import numpy as np

from longctx.evaluation import sweep
from longctx.training import log_files
from studies.claims import Figure, of
from studies.common import Job, Study, main
from studies.streaming import plot
from studies.streaming.measure import BUCKET, POLICIES


def jobs(seed: int, quick: bool) -> list[Job]:
  read = ['-m', 'studies.streaming.measure', '--workdir={workdir}']
  read += ['--rows=2'] * quick
  if seed == 0 and not quick:
    read += ['--stream_tokens=4000000']
  return [
    Job(
      run='sinks',
      seed=seed,
      config='configs/streaming.py',
      overrides={'steps': 100} if quick else {},
      then=(tuple(read),),
    )
  ]


def measure(job: Job, workdir: pathlib.Path) -> dict:
  """What a seed shows, in nats per byte."""
  short = log_files.read_lines(workdir / 'short.jsonl')
  short = {
    name: [row for row in short if row['policy'] == name] for name in POLICIES
  }
  # Every token of the last bucket, long after the first ones have left.
  found = {name: rows[-1]['loss'] for name, rows in short.items()}
  found['scored'] = short['sinks'][-1]['count']
  # Within the trained length nothing has left.
  found['dense_trained'] = short['dense'][1]['loss']
  found['curves'] = short
  lines = log_files.read_lines(workdir / 'stream.jsonl')
  endless = [row for row in lines if row['policy'] == 'sinks']
  if endless[-1]['end'] > BUCKET:
    task = sweep.choose(sweep.open_workdir(workdir), '').task
    passes = by_pass(endless, len(task.text('test')))
    found['loss_of_passes'] = passes
    found['drift'] = passes[-1] - passes[0]
    found['peak_memory'] = [endless[3]['peak_memory']]
    found['peak_memory'] += [endless[-1]['peak_memory']]
    found['seconds'] = sum(row['seconds'] for row in endless)
  return found


def by_pass(rows, length: int) -> list[float]:
  """The mean loss of each whole pass through the text, which begins anew."""
  whole = [row for row in rows if row['end'] - row['begin'] == BUCKET]
  found = []
  for index in range(whole[-1]['end'] // length):
    inside = [
      row
      for row in whole
      if index * length <= row['begin'] and row['end'] <= (index + 1) * length
    ]
    counts = [row['count'] for row in inside]
    losses = [row['loss'] for row in inside]
    found.append(float(np.average(losses, weights=counts)))
  return found


def above(policy: str) -> Figure:
  """Nats per byte above reading the window anew."""
  return of(policy)('sinks') - of('recompute')('sinks')


QUICK = {
  'sinks with positions of the cache cost none': above('sinks') <= 0.01,
}
CLAIMS = {
  'all keys, beyond the trained length, cost nats': above('dense') >= 1.0,
  'sinks with positions of the text cost some': above('sinks_text') >= 0.1,
  'a window without sinks costs nats, as published': above('window') >= 0.4,
}

STUDY = Study(
  name='streaming',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  quick=QUICK,
  show=plot.show,
)

if __name__ == '__main__':
  main(STUDY)
