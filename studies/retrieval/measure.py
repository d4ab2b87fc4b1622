"""Measures the memories of a capacity workdir at every number of pairs.

    python -m studies.retrieval.measure --workdir=DIR --seed=0

Writes capacity.json: accuracy of each run at PAIRS, and what
`studies.retrieval.law` predicts from as many random keys.
"""

import dataclasses
import pathlib

from longctx.evaluation import sweep
from longctx.training.runs import Run
from studies.common import write_measured
from studies.retrieval import law
from studies.retrieval.config import PAIRS


def measure(workdir: pathlib.Path, seed: int, batches: int) -> dict:
  runs = [exact(run) for run in sweep.open_workdir(workdir)]
  pairs = sweep.Sweep(parameter='num_pairs', values=PAIRS)
  rows = sweep.evaluate(runs, workdir, sweep=pairs, batches=batches)
  found = {}
  for run in runs:
    lines = [row for row in rows if row['run'] == run.name]
    found[run.name] = {
      'pairs': PAIRS,
      'accuracy': [row['accuracy'] for row in lines],
      'predicted': law.predicted(run.name, seed=seed),
    }
  return found


def exact(run: Run) -> Run:
  """The run, asked for num_pairs and not for up to so many."""
  task = {**run.config.task, 'min_pairs': 0}
  config = dataclasses.replace(run.config, task=task)
  return dataclasses.replace(run, config=config)


if __name__ == '__main__':
  write_measured(measure, __doc__, name='capacity.json', seed=0, batches=8)
