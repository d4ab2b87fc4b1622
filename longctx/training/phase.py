"""Phase changes: tasks are learned in jumps, and this finds them.

`PhaseDetector` watches a run as it trains and says when to look closely;
`estimate_change` says afterwards where the jump was, and how surely.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

# Steps that the fast and the slow average of the training accuracy look back.
FAST = 10
SLOW = 100
# Steps without a bend after which a score counts as flat.
PATIENCE = 100
# What an average strays by chance, in standard errors, is no bend.
STRAY = 5
# Evaluations that a change is looked for in: memory grows with their square.
MOST = 500
# Fields of a detector, without the underscore.
REMEMBERED = (
  *('steps', 'slow_steps', 'fast', 'slow', 'variance'),
  *('last', 'score', 'bent_at', 'before'),
)
# The smallest jump that is called a change.
MINIMUM = 0.1

StepNumbers = Sequence[int] | np.ndarray
Scores = Sequence[float] | np.ndarray


class PhaseDetector:
  """Phase-change detector: says when a score bends, from values alone.

  A score bends where it leaves its recent level by more than `bend`: where the
  fast and the slow average of the training accuracy differ by more, or two
  successive validations do. Averages of small batches differ by chance, so they
  have to differ by `STRAY` standard errors too, which follow from how much
  successive steps differ.

  What it says of a step depends on the steps before alone, and `state` is all
  that it remembers: a resumed run is told the same.
  """

  def __init__(self, *, bend: float, patience: int = PATIENCE):
    self.bend, self.patience = bend, patience
    self._steps = self._slow_steps = 0
    self._fast = self._slow = self._variance = 0.0
    self._last: float | None = None
    self._score: float | None = None
    self._bent_at: int | None = None
    self._before = 0.0

  def add_accuracy(self, step: int, accuracy: float):
    """Takes in the training accuracy of a step."""
    self._steps += 1
    self._slow_steps += 1
    if self._last is not None:
      # Half the squared difference of two draws has their variance for a mean.
      spread = (accuracy - self._last) ** 2 / 2
      self._variance += (spread - self._variance) / min(self._steps, SLOW)
    # Plain means at first, so that neither remembers the first step for long.
    self._fast += (accuracy - self._fast) / min(self._steps, FAST)
    self._slow += (accuracy - self._slow) / min(self._slow_steps, SLOW)
    self._last = accuracy
    if abs(self._fast - self._slow) > self._threshold():
      self._bends(step)

  def add_score(self, step: int, score: float):
    """Takes in the score of a validation."""
    if self._score is not None and abs(score - self._score) > self.bend:
      self._bends(step)
    self._score = score

  def dense(self, step: int) -> bool:
    """Whether to look closely at a step."""
    return self._bent_at is not None and step - self._bent_at <= self.patience

  def settled(self, step: int) -> bool:
    """Whether a change ended here: the first flat step, on another level."""
    if self._bent_at is None or step - self._bent_at != self.patience + 1:
      return False
    return abs(self._fast - self._before) > self._threshold()

  def _threshold(self) -> float:
    # Of an exponential average of independent draws.
    error = (self._variance / (2 * FAST - 1)) ** 0.5
    return max(self.bend, STRAY * error)

  def _bends(self, step: int):
    if not self.dense(step):
      self._before = self._slow
    self._bent_at = step
    # The level is a new one; an average that remembers the old would call it a
    # bend for long after it is flat.
    self._slow, self._slow_steps = self._fast, min(self._steps, FAST)

  def state(self) -> dict[str, Any]:
    """All that it remembers, as JSON."""
    return {key: getattr(self, f'_{key}') for key in REMEMBERED}

  def set_state(self, state: dict[str, Any]):
    for key in REMEMBERED:
      setattr(self, f'_{key}', state[key])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """Phase change: a jump of a score from one level to another.

  Attributes:
    step: where the score is halfway between the levels.
    low: the last evaluation that is surely before that step.
    high: the first evaluation that is surely after it.
    before: the level from which it jumps.
    after: the level to which it jumps.
    width: steps between 10% and 90% of the jump. A jump between two evaluations
      may have any width below their distance.
  """

  step: int
  low: int
  high: int
  before: float
  after: float
  width: float

  @property
  def jump(self) -> float:
    return self.after - self.before


def estimate_change(
  steps: StepNumbers, scores: Scores, *, minimum: float = MINIMUM
) -> Change | None:
  """The largest change of a score, None if it changed by less than `minimum`.

  Least squares of before + (after - before) σ((step - middle) / scale), over a
  grid of middles and scales, for each of which the levels are a linear
  regression. [low, high] has every middle whose squares exceed the least by at
  most 9 variances of the residuals (three standard errors; levels and scale
  fitted anew), and where the scores themselves cross halfway. It is widened to
  the evaluations around it, for nothing is known between two evaluations.

  Args:
    steps: of the evaluations, ascending; of more than 500 every second, third
      or so is taken.
    scores: as many.
    minimum: the smallest difference of levels that is a change. It also has to
      be four standard deviations of the residuals.
  """
  x, y = np.asarray(steps, float), np.asarray(scores, float)
  every = max(1, -(-len(x) // MOST))
  x, y = x[::every], y[::every]
  if len(x) < 2 or np.ptp(y) < minimum:
    return None
  if np.any(np.diff(x) <= 0):
    raise ValueError(f'steps must ascend, got {list(steps)}')
  middles, scales = _grid(x)
  squares, before, after = _fits(x, y, middles, scales)
  least = squares.min()
  variance = least / max(len(x) - 4, 1)
  # Many fits may be equally good, as all are between two evaluations; then the
  # one in the middle is taken.
  tie = 1e-9 * np.sum((y - y.mean()) ** 2)
  equal = np.argwhere(squares <= least + tie)
  best = tuple(equal[len(equal) // 2])
  low_level, high_level = np.clip([before[best], after[best]], y.min(), y.max())
  if abs(high_level - low_level) < max(minimum, 4 * variance**0.5):
    return None
  step = middles[equal[:, 0]].mean()
  near = squares.min(axis=1) <= least + max(9 * variance, tie)
  crossing = _crossing(x, y, step, low_level, high_level)
  ends = [*middles[near][[0, -1]], *crossing]
  return Change(
    step=round(step),
    low=int(x[max(np.searchsorted(x, min(ends), side='right') - 1, 0)]),
    high=int(x[min(np.searchsorted(x, max(ends)), len(x) - 1)]),
    before=float(low_level),
    after=float(high_level),
    # σ goes from 10% to 90% within twice log(9).
    width=float(2 * np.log(9) * scales[best[1]]),
  )


def _grid(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Middles, several between each two evaluations, and scales."""
  parts = max(400 // len(x), 2)
  within = (np.arange(parts) + 0.5) / parts
  middles = (x[:-1, None] + np.diff(x)[:, None] * within).ravel()
  finest = np.diff(x).min() / 20
  return middles, np.geomspace(finest, max(np.ptp(x) / 4, 2 * finest), 24)


def _fits(
  x: np.ndarray, y: np.ndarray, middles: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(squares, before, after), each [middle, scale]."""
  found = []
  centred, slack = y - y.mean(), 0.1 * np.ptp(y)
  for scale in scales:
    # σ by tanh, which overflows nowhere.
    curve = 0.5 + 0.5 * np.tanh((x - middles[:, None]) / (2 * scale))
    mean = curve.mean(axis=1)
    curve -= mean[:, None]
    norm = np.maximum(np.sum(curve**2, axis=1), 1e-12)
    jump = curve @ centred / norm
    squares = np.sum((centred - jump[:, None] * curve) ** 2, axis=1)
    before = y.mean() - jump * mean
    levels = np.stack([before, before + jump])
    # A curve of which a part was seen says nothing of its levels.
    outside = (levels < y.min() - slack) | (levels > y.max() + slack)
    squares[outside.any(axis=0)] = np.inf
    found.append((squares, *levels))
  return tuple(np.stack(part, axis=1) for part in zip(*found, strict=True))


def _crossing(
  x: np.ndarray, y: np.ndarray, step: float, before: float, after: float
) -> list[float]:
  """The evaluations between which scores cross halfway, nearest to `step`."""
  beyond = (y > (before + after) / 2) == (after > before)
  (places,) = np.nonzero(~beyond[:-1] & beyond[1:])
  if not len(places):
    return []
  nearest = places[np.argmin(np.abs((x[places] + x[places + 1]) / 2 - step))]
  return [x[nearest], x[nearest + 1]]


def jump_within(
  steps: StepNumbers, scores: Scores, within: int = 100
) -> float | None:
  """The largest rise of a score within so many steps.

  None where no two evaluations are so near each other.
  """
  x, y = np.asarray(steps), np.asarray(scores, float)
  ahead = x[None, :] - x[:, None]
  near = (ahead > 0) & (ahead <= within)
  if not near.any():
    return None
  return float((y[None, :] - y[:, None])[near].max())
