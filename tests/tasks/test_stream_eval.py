"""StreamEval: queries ask for what was told `lag` facts before."""

import numpy as np
import pytest

from longctx.tasks import make_task


def facts_and_queries(task, tokens):
  """(keys with values in order, [(facts so far, key)]) of whole lines."""
  width = task.key_length + 2
  lines = tokens[: len(tokens) // width * width].reshape(-1, width)
  facts, queries = [], []
  for line in lines.tolist():
    if line[0] == 0:
      facts.append(tuple(line[1:-1]))
    else:
      queries.append((len(facts), tuple(line[1:-1])))
  return facts, queries


@pytest.mark.parametrize('lag', [1, 2, 7])
def test_queries_ask_for_the_fact_that_lies_back_by_the_lag(lag):
  task = make_task('stream_eval', lag=lag, facts_per_query=3)
  example = task.get(0, 'train', 0)
  facts, queries = facts_and_queries(task, example.tokens)
  for told, key in queries:
    assert key == facts[max(told - lag, 0)]
  scored = sum(told >= lag for told, _ in queries)
  assert example.weights.sum() == scored


def test_a_key_comes_again_only_after_all_the_others():
  task = make_task('stream_eval', seq_len=4000, num_symbols=8)
  facts, _ = facts_and_queries(task, task.get(0, 'train', 0).tokens)
  assert len(set(facts[:64])) == 64
  assert facts[64:128] == facts[:64]


@pytest.mark.parametrize('key_length', [6, 8, 15])
def test_keys_of_any_length_are_drawn_without_listing_all(key_length):
  # 16**15 keys fit no memory.
  task = make_task('stream_eval', key_length=key_length, seq_len=400)
  example = task.get(0, 'train', 0)
  facts, _ = facts_and_queries(task, example.tokens)
  assert len(set(facts)) == len(facts) > 10
  scored = example.weights > 0
  answers = task.solve(example.tokens)
  np.testing.assert_array_equal(answers[scored], example.labels[scored])
  with pytest.raises(ValueError, match='fewer than 2'):
    make_task('stream_eval', key_length=16, seq_len=400)


def test_drawn_lags_stay_below_the_largest():
  task = make_task('stream_eval', seq_len=1000, max_lag=3)
  facts, queries = facts_and_queries(task, task.get(0, 'train', 0).tokens)
  lags = [told - facts.index(key) for told, key in queries if told > 3]
  assert set(lags) == {1, 2, 3}
  assert np.mean(lags) == pytest.approx(2, abs=0.3)


def test_the_answer_stands_behind_its_query():
  task = make_task('stream_eval', key_length=3)
  example = task.get(0, 'train', 0)
  (places,) = example.weights.nonzero()
  assert (example.tokens[places - 3] == 1).all()
  np.testing.assert_array_equal(
    example.tokens[places + 1], example.labels[places]
  )
