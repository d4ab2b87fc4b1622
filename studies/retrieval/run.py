"""Exact retrieval by memories of every size, and a law for it.

    python -m studies.retrieval.run
    python -m studies.retrieval.run --quick

Three experiments (config.py): the separation of softmax, Taylor, DeltaNet and
elu + 1 at 16 pairs; the capacity of memories of eleven kinds and sizes in one
layer, which measure.py holds against a prediction from random keys; and the
recall of 23 memories in two layers, a job each, which sizes.py measures at the
best of three learning rates.

On an accelerator `sizes` is launches, not arithmetic: run it with --processes
and XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import json
import pathlib

import numpy as np

from longctx.analysis.capacity import capacity, most_recalled
from longctx.training import metrics
from studies.common import Claim, Job, Study, main
from studies.retrieval import plot
from studies.retrieval.config import BEST, SIZES

CONFIG = 'studies/retrieval/config.py'
# Points of accuracy, as a share.
TOLERANCE = 0.05


# Enough to see that it runs.
QUICK = {'steps': 20, 'task.num_pairs': 4, 'eval.batches': 1}


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
      of_size('identity 4x16', seed, '--batches=2', overrides=QUICK),
    ]
  return [
    Job(run='curves', seed=seed, config=f'{CONFIG}:curves'),
    Job(
      run='capacity',
      seed=seed,
      config=f'{CONFIG}:capacity',
      then=((*measure, f'--seed={seed}'),),
    ),
    *(of_size(name, seed) for name in SIZES),
  ]


def of_size(name: str, seed: int, *more: str, overrides=None) -> Job:
  """A memory at every learning rate, and its recall at the best of them.

  The rates are compared for seed 0 alone.
  """
  return Job(
    run=f'sizes {name}',
    seed=seed,
    config=f'{CONFIG}:sizes/{name}' + f' at {BEST[name]}' * (seed > 0),
    overrides=overrides or {},
    then=(('-m', 'studies.retrieval.sizes', '--workdir={workdir}', *more),),
  )


def measure(job: Job, workdir: pathlib.Path) -> dict | list[dict]:
  if job.run.startswith('sizes '):
    return size(job.run.removeprefix('sizes '), workdir)
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


def size(name: str, workdir: pathlib.Path) -> dict:
  """What a memory recalls, by both definitions of the README."""
  found = json.loads((workdir / 'sizes.json').read_text())
  pairs, accuracy = found['pairs'], found['accuracy']
  return {
    'run': f'sizes/{name}',
    'capacity': capacity(pairs, accuracy),
    'recalled': most_recalled(pairs, accuracy, chance=found['chance']),
    **found,
  }


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


def of_experiment(rows, experiment: str) -> list[dict]:
  prefix = f'{experiment}/'
  return [row for name, row in rows.items() if name.startswith(prefix)]


def rank_correlation(x, y) -> float:
  """Spearman's: of ranks, equal values sharing theirs."""

  def ranks(values):
    values = np.asarray(values, np.float64)
    below = (values[:, None] > values).sum(1)
    return below + (values[:, None] == values).sum(1) / 2

  return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def follows_bytes(key: str):
  """Rank correlation of a figure of all memories of `sizes` with state bytes.

  Of ranks, which a logarithm does not change.
  """

  def figure(rows) -> float:
    found = of_experiment(rows, 'sizes')
    return rank_correlation(
      [row['state_bytes'] for row in found], [row[key] for row in found]
    )

  return figure


def with_rule(rows) -> list[dict]:
  """Memories of `capacity` that the law has a prediction for."""
  return [row for row in of_experiment(rows, 'capacity') if row['predicted']]


def errors(row) -> np.ndarray:
  return np.abs(np.subtract(row['accuracy'], row['predicted']))


def followers(rows) -> int:
  """Memories that the prediction meets at every number of pairs."""
  found = with_rule(rows)
  return sum(bool((errors(row) <= TOLERANCE).all()) for row in found)


def mean_error(rows) -> float:
  found = with_rule(rows)
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
    text='pairs answered at 90% follow state bytes, 23 memories of two layers: '
    'rank correlation',
    figure=follows_bytes('capacity'),
    at_least=0.9,
  ),
  Claim(
    text='pairs recalled at once follow state bytes, the same memories: rank '
    'correlation',
    figure=follows_bytes('recalled'),
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
