"""Markov: strategies are what they are called, and none beats `bigram`."""

import itertools

import numpy as np
import pytest

from longctx.tasks import make_task, markov


def test_strategies_count_what_came_before():
  tokens = np.array([0, 1, 1, 0, 1])
  rows = {
    'uniform': [[1 / 2, 1 / 2]] * 5,
    'unigram': [
      [2 / 3, 1 / 3],
      [2 / 4, 2 / 4],
      [2 / 5, 3 / 5],
      [3 / 6, 3 / 6],
      [3 / 7, 4 / 7],
    ],
    'bigram': [
      [1 / 2, 1 / 2],
      [1 / 2, 1 / 2],
      [1 / 3, 2 / 3],
      [1 / 3, 2 / 3],
      [2 / 4, 2 / 4],
    ],
  }
  assert rows.keys() == markov.STRATEGIES.keys()
  for name, expected in rows.items():
    np.testing.assert_allclose(markov.STRATEGIES[name](tokens, 2), expected)


def test_strategies_do_not_see_what_comes_after():
  task = make_task('markov')
  tokens = task.get(0, 'train', 0).tokens
  for strategy in markov.STRATEGIES.values():
    whole = strategy(tokens, 3)
    np.testing.assert_array_equal(whole[:40], strategy(tokens[:40], 3))
    np.testing.assert_allclose(whole.sum(axis=1), 1)


@pytest.mark.parametrize('num_states', [2, 3])
def test_expectations_are_those_of_all_sequences(num_states):
  T = 5
  accuracy = loss = total = 0.0
  for stream in itertools.product(range(num_states), repeat=T + 1):
    p = markov.bigram(np.array(stream[:-1]), num_states)
    probability = p[np.arange(T), stream[1:]].prod() / num_states
    total += probability
    accuracy += probability * p.max(axis=1).mean()
    loss -= probability * np.log(p[np.arange(T), stream[1:]]).mean()
  assert total == pytest.approx(1)
  task = make_task('markov', seq_len=T, num_states=num_states)
  assert task.ceiling == pytest.approx(accuracy, abs=0.005)
  assert task.optimal_loss == pytest.approx(loss, abs=0.005)


def test_expectations_are_those_of_many_examples():
  task = make_task('markov')
  rng = np.random.default_rng(1)
  right, losses = [], {name: [] for name in markov.STRATEGIES}
  for _ in range(1000):
    example = task.example(rng)
    right.append((task.solve(example.tokens) == example.labels).mean())
    for name, strategy in markov.STRATEGIES.items():
      p = strategy(example.tokens, 3)[np.arange(100), example.labels]
      losses[name].append(-np.log(p).mean())
  for values, expected, error in [
    (right, task.ceiling, 0.0009),
    (losses['bigram'], task.optimal_loss, 0.0012),
  ]:
    noise = np.hypot(np.std(values) / np.sqrt(1000), error)
    assert abs(np.mean(values) - expected) < 4 * noise
  mean = {name: np.mean(values) for name, values in losses.items()}
  assert mean['bigram'] < mean['unigram'] - 0.05 < mean['uniform'] - 0.1
