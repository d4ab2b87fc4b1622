"""How often trained models copy strings of each length, whole and by letter.

    python -m studies.copying.measure --workdir=DIR

A string counts as copied if each of its letters is the likeliest one after the
true ones before it; then greedy decoding copies it, and else it does not.
Writes copies.json.
"""

import math
import pathlib

import jax
import numpy as np
from flax import nnx

from longctx import tasks
from longctx.data.pipeline import make_iterator
from longctx.evaluation import sweep
from longctx.training import metrics
from studies.common import write_measured

LENGTHS = (2, 5, 10, 20, 35, 50, 100, 200, 500, 1000)
TOKENS = 32768


def measure(workdir: pathlib.Path, strings: int, longest: int) -> dict:
  found = {}
  for run in sweep.open_workdir(workdir):
    graph, params, *_ = sweep.restore(run)
    copied = jax.jit(
      lambda params, tokens, graph=graph: nnx.merge(graph, params)(
        tokens
      ).argmax(axis=-1)
    )
    lengths = [length for length in LENGTHS if length <= longest]
    rows = [shares(copied, params, run, length, strings) for length in lengths]
    model = nnx.merge(graph, params)
    found[run.name] = {
      'lengths': lengths,
      'strings': strings,
      'letters_right': [row['letters'] for row in rows],
      'strings_right': [row['whole'] for row in rows],
      'state_bytes': [model.state_bytes(2 * length + 1) for length in lengths],
    }
    metrics.say(f'{run.name}: {found[run.name]["letters_right"]}')
  return found


def shares(copied, params, run, length: int, strings: int) -> dict:
  """Shares of letters and of strings that come out right."""
  task = tasks.make_task(
    'copying',
    seq_len=2 * length + 1,
    num_symbols=run.task.num_symbols,
    min_length=length,
    max_length=length,
  )
  rows = max(1, min(strings, TOKENS // task.seq_len))
  batches = make_iterator(
    task,
    split='test',
    batch_size=rows,
    seed=run.config.seed,
    num_examples=math.ceil(strings / rows) * rows,
  )
  right = []
  for batch in batches:
    answers = np.asarray(copied(params, batch['tokens']))
    scored = batch['weights'] > 0
    right.append(((answers == batch['labels']) | ~scored)[:, length:-1])
  batches.close()
  right = np.concatenate(right)[:strings]
  return {
    'letters': float(right.mean()),
    'whole': float(right.all(axis=1).mean()),
  }


if __name__ == '__main__':
  write_measured(
    measure, __doc__, name='copies.json', strings=64, longest=LENGTHS[-1]
  )
