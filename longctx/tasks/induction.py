"""Induction heads: continue a random sequence that is being repeated."""

import dataclasses

import numpy as np

from longctx.tasks.checks import Positive, large_enough
from longctx.tasks.task import Example, Task, scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Task):
  """Induction: BOS, then a random permutation, repeated to the end.

  BOS is 0, symbols are 1 ... V - 1, the period P is uniform from min_period to
  max_period and no symbol comes twice in a period. P = 4, T = 10:

    position  0  1  2  3  4  5  6  7  8  9
    tokens    0  6  2  9  4  6  2  9  4  6
    labels    6  2  9  4  6  2  9  4  6  2
    weights   0  0  0  0  0  1  1  1  1  1

  Scored from the first repeated symbol on: before it nothing tells that the
  period is over. The rule that solves it is the induction head's (Olsson et
  al., 2022, https://arxiv.org/abs/2209.11895): find the previous occurrence of
  the current token, and answer with the token after it.

  With `score_first` all is scored, the first period too, as in a model of
  language: the loss then falls along the sequence even of a model that knows
  which symbols its context has and not their order.

  Chance is 1 / (V - 1): the permutation is uniform, so every symbol is as
  likely as another. (A model that knows the symbols of its context but not
  their order reaches about 1 / P.) The ceiling is 1 by the rule above;
  with `score_first` the expected accuracy of who knows the periods' lengths.

  Attributes:
    vocab_size: V, BOS included.
    min_period: shortest period.
    max_period: longest period; max_period <= V - 1 and
      max_period + 2 <= seq_len, so that something is always scored.
    score_first: whether the first period is scored as well.
  """

  seq_len: Positive = 64
  vocab_size: Positive = 64
  min_period: Positive = 16
  max_period: Positive = 32
  score_first: bool = False

  def check(self):
    low, high = self.min_period, self.max_period
    if not 1 <= low <= high:
      raise ValueError(
        f'min_period={low} and max_period={high} must satisfy '
        '1 <= min_period <= max_period'
      )
    large_enough(self, 'vocab_size', high + 1, 'max_period')
    large_enough(self, 'seq_len', high + 2, 'max_period')

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 1)

  @property
  def ceiling(self) -> float:
    if not self.score_first:
      return 1.0
    low, high, T = self.min_period, self.max_period, self.seq_len
    found = []
    for period in range(low, high + 1):
      new = [
        0.0 if self._repeats(t) else 1 / (self.vocab_size - 1 - t)
        for t in range(period)
      ]
      found.append(sum(new) + self._repeats(period) + T - period - 1)
    return sum(found) / len(found) / T

  def _repeats(self, t: int) -> bool:
    """Whether, after t different symbols, the first is the best guess."""
    if not self.min_period <= t < self.max_period:
      return t >= self.max_period
    # Of the periods that are not ruled out, each is as likely as another.
    over = 1 / (self.max_period - t + 1)
    left = self.vocab_size - 1 - t
    return left == 0 or over >= (1 - over) / left

  def example(self, rng: np.random.Generator) -> Example:
    period = int(rng.integers(self.min_period, self.max_period + 1))
    symbols = 1 + rng.permutation(self.vocab_size - 1)[:period]
    stream = np.zeros(self.seq_len + 1, np.int32)
    stream[1:] = np.resize(symbols, self.seq_len)
    places = slice(0 if self.score_first else period + 1, None)
    return scored(stream[:-1], places, labels=stream[1:])

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """What came after a token the last time, or what is likeliest."""
    follower: dict[int, int] = {}
    answers = np.zeros_like(tokens)
    unseen = set(range(1, self.vocab_size))
    for t, token in enumerate(tokens):
      if t:
        follower[tokens[t - 1]] = token
      unseen.discard(int(token))
      guess = tokens[1] if self._repeats(t) else min(unseen, default=0)
      answers[t] = follower.get(token, guess)
    return answers
