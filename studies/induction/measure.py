"""Scores and ablations of a trained model's heads, over its last checkpoint.

    python -m studies.induction.measure --workdir=DIR

Writes measured.json.
"""

import pathlib

from longctx.analysis.analyzer import Analyzer
from longctx.evaluation import sweep
from studies.common import write_measured

ROWS = 64


def measure(workdir: pathlib.Path) -> dict:
  run = sweep.choose(sweep.open_workdir(workdir), '')
  graph, params, step, _ = sweep.restore(run)
  analyzer = Analyzer(
    graph, run.model, run.task, rows=ROWS, seed=run.config.seed
  )
  found = analyzer.measure(params, step)
  return {**found, 'ablation': analyzer.ablate(params, step)}


if __name__ == '__main__':
  write_measured(measure, __doc__)
