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

import pathlib

import numpy as np

from longctx.analysis.capacity import capacity, most_recalled
from longctx.training import log_files
from studies.claims import Figure, of, of_run
from studies.common import Job, Study, main, read
from studies.retrieval import plot
from studies.retrieval.config import BEST, CURVES, SIZES

CONFIG = 'studies/retrieval/config.py'
# Points of accuracy, as a share.
TOLERANCE = 0.05


# Enough to see that it runs.
SMALL = {'steps': 20, 'task.num_pairs': 4, 'eval.batches': 1}


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
      of_size('identity 4x16', seed, '--batches=2', overrides=SMALL),
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
  config = read(workdir, 'config.json')
  if job.run == 'curves':
    return [curve(name, workdir / name) for name in config['runs']]
  found = read(workdir, 'capacity.json')
  return [
    {
      'run': f'capacity/{name}',
      'state_bytes': read(workdir / name)['state_bytes'],
      'capacity': capacity(one['pairs'], one['accuracy']),
      **one,
    }
    for name, one in found.items()
  ]


def size(name: str, workdir: pathlib.Path) -> dict:
  """What a memory recalls, by both definitions of the README."""
  found = read(workdir, 'sizes.json')
  pairs, accuracy = found['pairs'], found['accuracy']
  return {
    'run': f'sizes/{name}',
    'capacity': capacity(pairs, accuracy),
    'recalled': most_recalled(pairs, accuracy, chance=found['chance']),
    **found,
  }


def curve(name: str, workdir: pathlib.Path) -> dict:
  """Validation accuracy along the training, and that of the test split."""
  lines = log_files.read_lines(workdir / 'metrics.jsonl')
  lines = [row for row in lines if row['split'] == 'validation']
  found = read(workdir)
  return {
    'run': f'curves/{name}',
    'steps': [row['step'] for row in lines],
    'validation': [row['accuracy'] for row in lines],
    'accuracy': found['accuracy'],
    'state_bytes': found['state_bytes'],
  }


accuracy = of('accuracy', 'curves/')


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


def follows_bytes(key: str) -> Figure:
  """Rank correlation of a figure of all memories of `sizes` with state bytes.

  Of ranks, which a logarithm does not change.
  """

  def figure(rows) -> float:
    found = of_experiment(rows, 'sizes')
    return rank_correlation(
      [row['state_bytes'] for row in found], [row[key] for row in found]
    )

  return Figure(figure)


def errors(rows) -> list[np.ndarray]:
  """Of the memories of `capacity` that the law predicts, at each load."""
  return [
    np.abs(np.subtract(row['accuracy'], row['predicted']))
    for row in of_experiment(rows, 'capacity')
    if row['predicted']
  ]


@Figure
def followers(rows) -> int:
  """Memories that the prediction meets at every number of pairs."""
  return sum(bool((error <= TOLERANCE).all()) for error in errors(rows))


@Figure
def mean_error(rows) -> float:
  return float(np.mean(errors(rows)))


# At the fewest pairs.
two_pairs = of_run(lambda row: row['accuracy'][0], 'capacity/')
SOFTMAX, TAYLOR, DELTA, ELU = map(accuracy, CURVES)
QUICK = {
  'softmax answers 16 pairs by step 500': SOFTMAX >= 0.99,
  'a small memory answers two pairs': two_pairs('identity 8x32') >= 0.7,
}
CLAIMS = {
  'Taylor features answer 16 pairs by step 500': TAYLOR >= 0.99,
  'elu + 1 does not by step 1,500': ELU <= 0.6,
  'DeltaNet after 500 steps is above elu + 1 after 1,500': DELTA - ELU >= 0.05,
  'DeltaNet is below Taylor features by step 500': TAYLOR - DELTA >= 0.01,
  'pairs at 90% follow bytes, ranks of 23': follows_bytes('capacity') >= 0.9,
  'pairs at once follow bytes, ranks too': follows_bytes('recalled') >= 0.9,
  'memories within 5 points of the untrained one at all loads': followers >= 6,
  'mean distance of trained from untrained accuracy': mean_error <= TOLERANCE,
}

STUDY = Study(
  name='retrieval',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  quick=QUICK,
  show=plot.show,
)

if __name__ == '__main__':
  main(STUDY)
