"""Exact retrieval by memories of every size, and a law for it.

    python -m studies.retrieval.run
    python -m studies.retrieval.run --quick

Two trainings per seed, of several runs each (config.py): the separation of
softmax, Taylor, DeltaNet and elu + 1 at 16 pairs, and the capacity of memories
of eleven kinds and sizes, which measure.py holds against a prediction from
random keys.
"""

import json
import pathlib

import numpy as np

from longctx import metrics
from longctx.analysis.capacity import capacity
from studies.common import Claim, Job, Study, main
from studies.retrieval import plot

CONFIG = 'studies/retrieval/config.py'
# Points of accuracy, as a share.
TOLERANCE = 0.05


def jobs(seed: int, quick: bool) -> list[Job]:
  measure = ('-m', 'studies.retrieval.measure', '--workdir={workdir}')
  if quick:
    return [
      Job(
        run='curves',
        seed=seed,
        config=f'{CONFIG}:curves/softmax',
      ),
      Job(
        run='capacity',
        seed=seed,
        config=f'{CONFIG}:capacity/identity 8x32',
        then=((*measure, '--batches=2'),),
      ),
    ]
  return [
    Job(run='curves', seed=seed, config=f'{CONFIG}:curves'),
    Job(
      run='capacity',
      seed=seed,
      config=f'{CONFIG}:capacity',
      then=((*measure, f'--seed={seed}'),),
    ),
  ]


def measure(job: Job, workdir: pathlib.Path) -> list[dict]:
  config = json.loads((workdir / 'config.json').read_text())
  if job.run == 'curves':
    return [curve(name, workdir / name) for name in config['runs']]
  found = json.loads((workdir / 'capacity.json').read_text())
  return [
    {
      'run': f'capacity/{name}',
      'state_bytes': results(workdir / name)['state_bytes'],
      'capacity': capacity(one['pairs'], one['accuracy']),
      **one,
    }
    for name, one in found.items()
  ]


def results(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / 'results.json').read_text())


def curve(name: str, workdir: pathlib.Path) -> dict:
  """Validation accuracy along the training, and that of the test split."""
  lines = metrics.read_lines(workdir / 'metrics.jsonl')
  lines = [row for row in lines if row['split'] == 'validation']
  found = results(workdir)
  return {
    'run': f'curves/{name}',
    'steps': [row['step'] for row in lines],
    'validation': [row['accuracy'] for row in lines],
    'accuracy': found['accuracy'],
    'state_bytes': found['state_bytes'],
  }


def accuracy(name: str):
  return lambda rows: rows[f'curves/{name}']['accuracy']


def difference(one: str, other: str):
  return lambda rows: accuracy(one)(rows) - accuracy(other)(rows)


def memories(rows, *, windows: bool = True) -> list[dict]:
  found = [row for name, row in rows.items() if name.startswith('capacity/')]
  return [row for row in found if windows or row['predicted']]


def rank_correlation(x, y) -> float:
  """Spearman's: of ranks, equal values sharing theirs."""

  def ranks(values):
    values = np.asarray(values, np.float64)
    below = (values[:, None] > values).sum(1)
    return below + (values[:, None] == values).sum(1) / 2

  return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def of_bytes(rows, *, windows: bool) -> float:
  found = memories(rows, windows=windows)
  return rank_correlation(
    [row['state_bytes'] for row in found], [row['capacity'] for row in found]
  )


def errors(row) -> np.ndarray:
  return np.abs(np.subtract(row['accuracy'], row['predicted']))


def followers(rows) -> int:
  """Memories that the prediction meets at every number of pairs."""
  found = memories(rows, windows=False)
  return sum(bool((errors(row) <= TOLERANCE).all()) for row in found)


def mean_error(rows) -> float:
  found = memories(rows, windows=False)
  return float(np.mean([errors(row) for row in found]))


def two_pairs(rows) -> float:
  """Accuracy at the fewest pairs, of the memory that --quick trains."""
  return rows['capacity/identity 8x32']['accuracy'][0]


CLAIMS = (
  Claim(
    text='softmax answers 16 pairs by step 500',
    figure=accuracy('softmax'),
    at_least=0.99,
    quick=True,
  ),
  Claim(
    text='Taylor features answer them by step 500',
    figure=accuracy('taylor'),
    at_least=0.99,
  ),
  Claim(
    text='elu + 1 does not by step 1,500', figure=accuracy('elu+1'), at_most=0.6
  ),
  Claim(
    text='DeltaNet after 500 steps is above elu + 1 after 1,500',
    figure=difference('delta', 'elu+1'),
    at_least=0.05,
  ),
  Claim(
    text='DeltaNet is below Taylor features by step 500',
    figure=difference('taylor', 'delta'),
    at_least=0.01,
  ),
  Claim(
    text='capacity follows state bytes, all memories: rank correlation',
    figure=lambda rows: of_bytes(rows, windows=True),
    at_least=0.9,
  ),
  Claim(
    text='capacity follows state bytes, without windows: rank correlation',
    figure=lambda rows: of_bytes(rows, windows=False),
    at_least=0.9,
  ),
  Claim(
    text='memories within 5 points of the untrained one at all loads',
    figure=followers,
    at_least=6,
  ),
  Claim(
    text='mean distance of the trained from the untrained accuracy',
    figure=mean_error,
    at_most=TOLERANCE,
  ),
  Claim(
    text='a small memory answers two pairs',
    figure=two_pairs,
    at_least=0.7,
    quick=True,
  ),
)


STUDY = Study(
  name='retrieval',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  show=plot.show,
)

if __name__ == '__main__':
  main(STUDY)
