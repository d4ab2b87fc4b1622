"""Measures the memories of a capacity workdir at every number of pairs.

    python -m studies.retrieval.measure --workdir=DIR --seed=0

Writes capacity.json: accuracy of each run at PAIRS, and what
`studies.retrieval.law` predicts from as many random keys.
"""

import argparse
import dataclasses
import pathlib

from longctx.evaluation import sweep
from longctx.training import metrics
from longctx.training.runs import Run
from studies.retrieval import law
from studies.retrieval.config import PAIRS


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seed', type=int, default=0, help='of the prediction')
  parser.add_argument('--batches', type=int, default=8)
  args = parser.parse_args()
  runs = [exact(run) for run in sweep.open_workdir(args.workdir)]
  pairs = sweep.Sweep(parameter='num_pairs', values=PAIRS)
  rows = sweep.evaluate(runs, args.workdir, sweep=pairs, batches=args.batches)
  found = {}
  for run in runs:
    lines = [row for row in rows if row['run'] == run.name]
    found[run.name] = {
      'pairs': PAIRS,
      'accuracy': [row['accuracy'] for row in lines],
      'predicted': law.predicted(run.name, seed=args.seed),
    }
  metrics.write_json(args.workdir / 'capacity.json', found)


def exact(run: Run) -> Run:
  """The run, asked for num_pairs and not for up to so many."""
  task = {**run.config.task, 'min_pairs': 0}
  config = dataclasses.replace(run.config, task=task)
  return dataclasses.replace(run, config=config)


if __name__ == '__main__':
  main()
