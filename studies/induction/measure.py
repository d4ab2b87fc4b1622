"""Scores and ablations of a trained model's heads, over its last checkpoint.

    python -m studies.induction.measure --workdir=DIR

Writes measured.json.
"""

import argparse
import pathlib

from longctx.analysis.analyzer import Analyzer
from longctx.evaluation import sweep
from longctx.training import metrics

ROWS = 64


def measure(workdir: pathlib.Path) -> dict:
  run = sweep.choose(sweep.open_workdir(workdir), '')
  graph, params, step = sweep.restore(run)
  analyzer = Analyzer(
    graph, run.model, run.task, rows=ROWS, seed=run.config.seed
  )
  found = analyzer.measure(params, step)
  return {**found, 'ablation': analyzer.ablate(params, step)}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  workdir = parser.parse_args().workdir
  metrics.write_json(workdir / 'measured.json', measure(workdir))


if __name__ == '__main__':
  main()
