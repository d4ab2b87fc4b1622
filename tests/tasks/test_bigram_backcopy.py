"""BigramBackcopy: triggers copy, all else follows the bigrams, as computed."""

import numpy as np
import pytest

from longctx.tasks import make_task


def draw(task, num_examples):
  """tokens and labels of many examples, [num_examples, T]."""
  rng = np.random.default_rng(0)
  examples = [task.example(rng) for _ in range(num_examples)]
  return (
    np.stack([e.tokens for e in examples]),
    np.stack([e.labels for e in examples]),
  )


def test_after_a_trigger_comes_the_token_before_it():
  task = make_task('bigram_backcopy')
  tokens, labels = draw(task, 200)
  rows, places = task.is_trigger(tokens).nonzero()
  assert len(rows) > 500
  assert (places >= 2).all()
  copied = tokens[rows, places - 1]
  np.testing.assert_array_equal(labels[rows, places], copied)
  assert not (task.is_trigger(copied) | (copied == 0)).any()


def test_other_successors_are_as_frequent_as_their_bigrams():
  task = make_task('bigram_backcopy', vocab_size=6, num_triggers=1)
  tokens, labels = draw(task, 2000)
  for token in range(6):
    if token in task.triggers:
      continue
    followers = labels[tokens == token]
    share = np.bincount(followers, minlength=6) / len(followers)
    p = task.bigrams[token]
    noise = np.sqrt(p * (1 - p) / len(followers))
    assert (abs(share - p) <= 4 * noise + 1e-12).all(), token


def test_triggers_are_the_most_frequent_symbols_of_the_bigrams():
  task = make_task('bigram_backcopy')
  rows = task.bigrams[1:, 1:]
  share = np.full(47, 1 / 47)
  for _ in range(5000):
    share = share @ rows
  np.testing.assert_allclose(share @ rows, share, atol=1e-12)
  assert set(task.triggers) == set(1 + np.argsort(-share)[:3])
  start = share.copy()
  start[task.triggers - 1] = 0
  np.testing.assert_allclose(task.bigrams[0, 1:], start / start.sum())


@pytest.mark.parametrize(
  'fields',
  [
    dict(),
    dict(seq_len=5, chain_seed=3),
    dict(seq_len=32, vocab_size=8, concentration=1.0),
    dict(seq_len=32, num_triggers=0),
  ],
  ids=str,
)
def test_expectations_are_those_of_many_examples(fields):
  task = make_task('bigram_backcopy', **fields)
  tokens, labels = draw(task, 2000)
  answers = np.stack([task.solve(row) for row in tokens])
  p = np.where(task.is_trigger(tokens), 1, task.bigrams[tokens, labels])
  common = np.bincount(labels.ravel()).argmax()
  measured = {
    'ceiling': answers == labels,
    'chance': labels == common,
    'optimal_loss': -np.log(p),
  }
  for name, values in measured.items():
    of_examples = values.mean(axis=1)
    noise = of_examples.std() / np.sqrt(len(tokens))
    assert abs(of_examples.mean() - getattr(task, name)) < 4 * noise, name


def test_rows_depend_on_the_chain_seed_alone():
  task = make_task('bigram_backcopy')
  longer = make_task('bigram_backcopy', seq_len=100)
  other = make_task('bigram_backcopy', chain_seed=1)
  np.testing.assert_array_equal(task.bigrams, longer.bigrams)
  assert (task.bigrams != other.bigrams).any()
