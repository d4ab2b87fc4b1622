"""MQAR: the clean filler is unambiguous, the published one is reproduced."""

import numpy as np
import pytest

from longctx.tasks import make_task


def stray_keys(task, example) -> int:
  """How often filler repeats a key of the example."""
  keys = example.tokens[: 2 * task.num_pairs : 2]
  filler = example.tokens[2 * task.num_pairs :]
  filler = filler[example.weights[2 * task.num_pairs :] == 0]
  return int(np.isin(filler, keys).sum())


def test_clean_filler_never_repeats_a_live_key():
  task = make_task('mqar', vocab_size=40, seq_len=90, num_pairs=15)
  assert not any(stray_keys(task, task.get(0, 'train', i)) for i in range(200))


@pytest.mark.parametrize(
  ('fields', 'share', 'mean'),
  # Re-runs of the published generator, peers' numbers: share of examples with
  # a live key in the filler, and how many of them there are in one.
  [
    (dict(vocab_size=8192, seq_len=512, num_pairs=64), 0.92, 2.5),
    (dict(vocab_size=8192, seq_len=1024, num_pairs=256), 1.0, 7.9),
    (dict(vocab_size=256, seq_len=128, num_pairs=8), 0.97, None),
    (dict(vocab_size=8192, seq_len=64, num_pairs=4), 0.018, None),
  ],
)
def test_zoology_filler_collides_as_often_as_published(fields, share, mean):
  task = make_task('mqar', filler='zoology', **fields)
  rng = np.random.default_rng(0)
  strays = [stray_keys(task, task.example(rng)) for _ in range(1000)]
  assert np.mean(np.array(strays) > 0) == pytest.approx(share, abs=0.025)
  if mean is not None:
    assert np.mean(strays) == pytest.approx(mean, abs=0.2)


def test_zero_filler_leaves_zeros_everywhere_else():
  task = make_task('mqar', filler='zero', num_pairs=4)
  example = task.get(0, 'train', 0)
  assert np.count_nonzero(example.tokens) == 3 * 4


def test_gaps_follow_the_power_law():
  task = make_task('mqar', num_pairs=1, seq_len=18, power_a=0.01)
  rng = np.random.default_rng(0)
  gaps = [
    int(np.argmax(task.example(rng).weights)) // 2 - 1 for _ in range(4000)
  ]
  p = np.arange(1, 9) ** (0.01 - 1)
  share = np.bincount(gaps, minlength=8) / len(gaps)
  np.testing.assert_allclose(share, p / p.sum(), atol=0.03)


def test_several_gaps_are_drawn_as_numpy_draws_without_replacement():
  task = make_task('mqar', num_pairs=2, seq_len=12, power_a=0.5, filler='zero')
  rng, other = np.random.default_rng(0), np.random.default_rng(1)
  p = np.arange(1, 5) ** (0.5 - 1)
  ours, theirs = np.zeros((4, 4)), np.zeros((4, 4))
  for _ in range(4000):
    tokens = task.example(rng).tokens
    first, second = (
      (4 + int(np.argmax(tokens[4:] == key)) - 4) // 2 for key in tokens[:4:2]
    )
    ours[first, second] += 1
    theirs[tuple(other.choice(4, 2, replace=False, p=p / p.sum()))] += 1
  np.testing.assert_allclose(ours / 4000, theirs / 4000, atol=0.025)


def test_number_of_pairs_is_drawn_between_min_pairs_and_num_pairs():
  task = make_task('mqar', num_pairs=5, min_pairs=2, seq_len=20)
  rng = np.random.default_rng(0)
  drawn = []
  for _ in range(400):
    example = task.example(rng)
    drawn.append(int(example.weights.sum()))
    scored = example.weights > 0
    answers = task.solve(example.tokens)
    np.testing.assert_array_equal(answers[scored], example.labels[scored])
  counts = np.bincount(drawn, minlength=6)
  assert not counts[:2].any()
  np.testing.assert_allclose(counts[2:] / 400, 0.25, atol=0.08)


def test_min_pairs_that_num_pairs_does_not_reach_is_refused():
  with pytest.raises(ValueError, match='min_pairs=6'):
    make_task('mqar', num_pairs=5, min_pairs=6)
