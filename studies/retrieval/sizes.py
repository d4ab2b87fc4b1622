"""Measures a memory of `sizes` at every load, at its best learning rate.

    python -m studies.retrieval.sizes --workdir=DIR

The best rate is the one with the best accuracy on the validation split, over
the loads of training; the test split is read at that rate alone. Writes
sizes.json.
"""

import pathlib

import jax
import numpy as np

from longctx import tasks
from longctx.data.pipeline import make_iterator
from longctx.evaluation import sweep
from longctx.training import steps
from longctx.training.runs import Run
from studies.common import read, write_measured
from studies.retrieval.config import LOADS


def measure(workdir: pathlib.Path, batches: int) -> dict:
  runs = sweep.open_workdir(workdir)
  results = {run.name: read(run.workdir) for run in runs}
  validation = {n: one['validation_accuracy'] for n, one in results.items()}
  best = max(runs, key=lambda run: validation[run.name])
  loads = [n for n in LOADS if n <= best.task.num_pairs]
  return {
    'pairs': loads,
    'accuracy': accuracies(best, loads, batches=batches),
    'chance': best.task.chance,
    'state_bytes': results[best.name]['state_bytes'],
    'rate': best.config.optimizer.learning_rate,
    'validation': validation,
  }


def accuracies(run: Run, loads: list[int], *, batches: int) -> list[float]:
  """Share of the queries answered at each number of pairs, test split.

  All loads have one program: `evaluate.evaluate` would compile one for each
  number of scored places.
  """
  graph, params, step, _ = sweep.restore(run)
  evaluate = steps.make_steps(graph, run.config).evaluate
  found = []
  for n in loads:
    fields = {**run.config.task, 'num_pairs': n, 'min_pairs': 0}
    iterator = make_iterator(
      tasks.make_task(**fields),
      split='test',
      batch_size=run.config.batch_size,
      seed=run.config.seed,
      num_examples=batches * run.config.batch_size,
    )
    sums = [
      jax.device_get(evaluate(params, steps.put(batch, None), np.int32(step)))
      for batch in iterator
    ]
    iterator.close()
    correct, weight = (
      sum(float(s[k]) for s in sums) for k in ('correct', 'weight')
    )
    found.append(correct / weight)
  return found


if __name__ == '__main__':
  write_measured(measure, __doc__, name='sizes.json', batches=16)
