"""An answer depends on the relevant tokens and the query, on nothing else."""

import numpy as np
import pytest

from longctx.tasks import TASKS, make_task
from longctx.tasks.task import Example
from longctx.training import runs, steps
from longctx.training.config import ParallelConfig

# The token that begins the questions, at the end of these tasks.
QUERIES = {'arithmetic': 4, 'multi_needle': 2, 'variable_tracking': 2}

cases = pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('arithmetic', dict()),
    ('arithmetic', dict(in_topic=False)),
    ('arithmetic', dict(num_steps=1, num_irrelevant=9)),
    ('multi_needle', dict()),
    ('variable_tracking', dict()),
    ('variable_tracking', dict(num_chains=6, num_hops=0)),
  ],
)


def answers(task, tokens: np.ndarray, example: Example) -> np.ndarray | None:
  """What is answered where it is scored; None where nothing can be."""
  try:
    return task.solve(tokens)[example.weights > 0]
  except KeyError:
    return None


def tokens_of_query(name: str, example: Example) -> np.ndarray:
  return np.logical_or.accumulate(example.tokens == QUERIES[name])


@cases
def test_answer_needs_no_token_that_is_not_relevant(name, fields):
  task = make_task(name, **fields)
  for index in range(50):
    example = task.get(0, 'train', index)
    asked = tokens_of_query(name, example)
    assert not (example.relevant & asked).any()
    kept = example.relevant | asked
    noise = task.vocab_size - 1
    found = answers(task, np.where(kept, example.tokens, noise), example)
    np.testing.assert_array_equal(found, example.labels[example.weights > 0])


@cases
def test_answer_needs_every_relevant_token(name, fields):
  task = make_task(name, **fields)
  for index in range(20):
    example = task.get(0, 'train', index)
    right = example.labels[example.weights > 0]
    for place in np.flatnonzero(example.relevant):
      found = []
      # Counted modulo something, one of two noises may pass for the number.
      for noise in (task.vocab_size - 1, task.vocab_size - 2):
        tokens = example.tokens.copy()
        tokens[place] = noise
        found.append(answers(task, tokens, example))
      assert not all(np.array_equal(answer, right) for answer in found)


def test_other_tasks_do_not_say_what_is_relevant():
  others = {'bytes_lm', 'opinions', 'text_lm'}
  for name in TASKS.keys() - QUERIES.keys() - others:
    assert make_task(name).get(0, 'train', 0).relevant is None


@pytest.mark.parametrize('layout', ['contiguous', 'zigzag', 'striped'])
def test_relevant_tokens_lie_on_a_mesh_as_all_others(layout):
  task = make_task('variable_tracking', seq_len=61)
  examples = [task.get(0, 'train', row).arrays() for row in range(2)]
  batch = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
  placement = runs.make_placement(ParallelConfig(seq=4, layout=layout), 61)
  placed = steps.put(steps.with_query_indices(batch), placement)
  assert placed['relevant'].dtype == bool
  assert placed['relevant'].sharding == placed['tokens'].sharding
  for key in batch:
    there = placement.layout.restore(np.asarray(placed[key]))
    np.testing.assert_array_equal(there, batch[key])
  assert placed['relevant'].sum() == batch['relevant'].sum()
