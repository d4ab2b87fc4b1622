"""Phase changes: where a score bends, and where it jumped."""

import json

import numpy as np
import pytest

from longctx.training.phase import PhaseDetector, estimate_change, jump_within


def curve(steps, middle, width, before, after):
  """A logistic jump; `width` from 10% to 90%."""
  scale = width / (2 * np.log(9))
  z = (np.asarray(steps) - middle) / (2 * scale)
  return before + (after - before) * (1 + np.tanh(z)) / 2


def dense_around(middle, *, every=50, end=1000, dense_every=5, reach=60):
  """Evaluations as a run makes them: dense where the score bends."""
  return [
    step
    for step in range(1, end + 1)
    if step % every == 0
    or (abs(step - middle) <= reach and step % dense_every == 0)
  ]


@pytest.mark.parametrize('sampling', ['even', 'dense'])
@pytest.mark.parametrize('noise', [0.005, 0.03])
def test_true_step_lies_in_the_interval(sampling, noise):
  rng = np.random.default_rng(0)
  hits, spans, trials = 0, [], 50
  for _ in range(trials):
    middle, width = rng.uniform(250, 750), rng.uniform(2, 200)
    before, after = rng.uniform(0, 0.3), rng.uniform(0.6, 1.0)
    steps = list(range(25, 1001, 25))
    if sampling == 'dense':
      steps = dense_around(middle)
    scores = curve(steps, middle, width, before, after)
    scores += noise * rng.standard_normal(len(steps))
    change = estimate_change(steps, scores)
    hits += change.low <= middle <= change.high
    spans.append(change.high - change.low)
    assert change.low <= change.step <= change.high
    assert abs(change.jump - (after - before)) < 0.05 + 4 * noise
  assert hits >= 0.95 * trials
  # An interval of everything would hit too.
  assert np.median(spans) <= 50


def test_width_of_a_resolved_change_is_measured():
  steps = np.arange(10, 1001, 10)
  change = estimate_change(steps, curve(steps, 400, 150, 0.1, 0.9))
  assert abs(change.step - 400) <= 5
  assert change.width == pytest.approx(150, rel=0.15)
  assert change.before == pytest.approx(0.1, abs=0.01)
  assert change.after == pytest.approx(0.9, abs=0.01)


def test_jump_between_two_evaluations_is_known_no_better_than_they_are_apart():
  change = estimate_change([200, 400, 600, 800], [0.1, 0.1, 0.9, 0.9])
  assert (change.low, change.step, change.high) == (400, 500, 600)
  assert (change.before, change.after) == pytest.approx((0.1, 0.9), abs=1e-3)
  assert change.width < 200
  assert estimate_change([100, 200], [0.0, 1.0]).step == 150


def test_largest_of_two_changes_is_told():
  steps = np.arange(20, 2001, 20)
  scores = curve(steps, 500, 50, 0.1, 0.3) + curve(steps, 1500, 50, 0, 0.6)
  change = estimate_change(steps, scores)
  assert change.low <= 1500 <= change.high


def test_nothing_changed():
  rng = np.random.default_rng(0)
  steps = range(10, 501, 10)
  assert estimate_change([], []) is None
  assert estimate_change([10], [0.5]) is None
  assert estimate_change(steps, [0.5] * 50) is None
  assert estimate_change(steps, np.linspace(0.5, 0.55, 50)) is None
  noisy = [
    estimate_change(steps, 0.5 + 0.05 * rng.standard_normal(50))
    for _ in range(20)
  ]
  assert noisy == [None] * 20


def test_steps_must_ascend():
  with pytest.raises(ValueError, match='must ascend'):
    estimate_change([10, 10], [0.0, 1.0])


def test_jump_within_so_many_steps():
  steps, scores = [0, 60, 120, 180, 400], [0.5, 0.1, 0.4, 0.6, 1.0]
  assert jump_within(steps, scores) == pytest.approx(0.3)
  assert jump_within(steps, scores, 120) == pytest.approx(0.5)
  assert jump_within(steps, scores, 10) is None


def watch(detector, accuracies, first=1):
  """Steps that are dense and steps at which a change settled."""
  dense, settled = [], []
  for step, accuracy in enumerate(accuracies, first):
    if detector.dense(step):
      dense.append(step)
    if detector.settled(step):
      settled.append(step)
    detector.add_accuracy(step, float(accuracy))
  return dense, settled


def accuracies(*, middle, end=1000, noise=0.02):
  rng = np.random.default_rng(0)
  steps = np.arange(1, end + 1)
  clean = curve(steps, middle, 40, 0.1, 0.9)
  return clean + noise * rng.standard_normal(end)


def test_dense_from_the_onset_of_a_change_until_it_is_flat_again():
  dense, settled = watch(PhaseDetector(bend=0.05), accuracies(middle=300))
  assert 270 <= dense[0] <= 300
  assert dense == list(range(dense[0], dense[-1] + 1))
  # Flat from 330 on, and then for a hundred steps.
  assert 400 < dense[-1] < 480
  assert settled == [dense[-1] + 1]


@pytest.mark.parametrize('noise', [0.0, 0.02, 0.2])
def test_noise_of_small_batches_is_no_bend(noise):
  flat = accuracies(middle=10_000, end=2000, noise=noise)
  assert watch(PhaseDetector(bend=0.05), flat) == ([], [])


def test_validations_that_differ_are_a_bend():
  detector = PhaseDetector(bend=0.1, patience=20)
  for step, score in ((10, 0.2), (20, 0.25), (30, 0.5), (40, 0.5)):
    detector.add_score(step, score)
    assert detector.dense(step + 1) == (step >= 30)
  assert detector.dense(50) and not detector.dense(51)
  # The training accuracy has not moved.
  assert not detector.settled(51)


def test_detector_continued_from_its_state_says_the_same():
  values = accuracies(middle=100, end=600)
  whole = watch(PhaseDetector(bend=0.05), values)
  for cut in (1, 100, 150):
    first, second = PhaseDetector(bend=0.05), PhaseDetector(bend=0.05)
    before = watch(first, values[:cut])
    second.set_state(json.loads(json.dumps(first.state())))
    after = watch(second, values[cut:], first=cut + 1)
    assert tuple(a + b for a, b in zip(before, after, strict=True)) == whole
