"""Multi-query associative recall (MQAR): look up keys seen in the context."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from longctx.tasks.checks import Natural, Positive, large_enough
from longctx.tasks.task import Example, Task, scored
from longctx.typing import PositiveNumber

FILLERS = ('clean', 'zero', 'zoology')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Task):
  """MQAR: key-value pairs, then every key once more: answer with its value.

  Keys are drawn from [1, V/2), values from [V/2, V), both without replacement.
  The pairs stand first; then query i stands at the even offset 2 * gap_i, the
  gaps drawn without replacement with probability proportional to
  (j + 1)^(power_a - 1), as repeats in text are. Every other place is filler.
  Two pairs, V = 16, T = 12, filler `.`:

    position  0  1  2  3  4  5  6  7  8  9 10 11
    tokens    3 12  5  9  5  .  .  .  3  .  .  .
    labels                9          12
    weights   0  0  0  0  1  0  0  0  1  0  0  0

  Paper: Zoology (Arora et al., 2023, https://arxiv.org/abs/2312.04927).

  Chance is one over the number of values, V - V // 2: every value is as likely
  as another. The ceiling is 1: the pairs come first, so the earliest occurrence
  of a key has its answer beside it. With `filler='zoology'` that still holds,
  but a model that trusts a later occurrence errs: the published filler repeats
  live keys (in 97% of the examples at V = 256, T = 128, 8 pairs).

  Attributes:
    vocab_size: V. Published: 8192.
    num_pairs: number of pairs and of queries; 4 * num_pairs <= seq_len.
    min_pairs: draw that number for each example, uniformly from here up to
      num_pairs; 0: it is num_pairs.
    power_a: exponent of the gaps' power law; 1 makes them uniform.
    filler: 'clean' draws filler from all tokens but the example's own keys, so
      that every query has exactly one answer; 'zero' leaves zeros there (the
      published generator with random_non_queries=False); 'zoology' draws it
      from the whole vocabulary (random_non_queries=True).
  """

  seq_len: Positive = 64
  vocab_size: Positive = 256
  num_pairs: Positive = 16
  min_pairs: Natural = 0
  power_a: PositiveNumber = 0.01
  filler: Literal[FILLERS] = 'clean'

  def check(self):
    if self.min_pairs > self.num_pairs:
      raise ValueError(
        f'min_pairs={self.min_pairs} must be 0 or up to num_pairs='
        f'{self.num_pairs}'
      )
    large_enough(self, 'seq_len', 4 * self.num_pairs, 'num_pairs')
    large_enough(self, 'vocab_size', 2 * (self.num_pairs + 1), 'num_pairs')

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - self.vocab_size // 2)

  def example(self, rng: np.random.Generator) -> Example:
    T, n, half = self.seq_len, self.num_pairs, self.vocab_size // 2
    if self.min_pairs:
      n = int(rng.integers(self.min_pairs, n + 1))
    keys = 1 + rng.choice(half - 1, n, replace=False)
    values = half + rng.choice(self.vocab_size - half, n, replace=False)
    # The n largest of log p + Gumbel noise, in order, are n draws without
    # replacement.
    log_p = gap_log_probabilities((T - 2 * n) // 2, self.power_a)
    gaps = np.argsort(-(log_p + rng.gumbel(size=log_p.size)))[:n]
    queries = 2 * (n + gaps)

    tokens = self._filler(rng, keys)
    tokens[0 : 2 * n : 2] = keys
    tokens[1 : 2 * n : 2] = values
    tokens[queries] = keys
    return scored(tokens, queries, answers=values)

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The answer stands after the first occurrence of the key."""
    answers: dict[int, int] = {}
    for key, value in zip(tokens[:-1:2], tokens[1::2], strict=True):
      answers.setdefault(key, value)
    return np.array([answers.get(token, 0) for token in tokens])

  def _filler(self, rng: np.random.Generator, keys: np.ndarray) -> np.ndarray:
    """int32[T] of filler, to be overwritten at pairs and queries."""
    if self.filler == 'zero':
      return np.zeros(self.seq_len, np.int32)
    if self.filler == 'zoology':
      return rng.integers(self.vocab_size, size=self.seq_len, dtype=np.int32)
    legal = np.ones(self.vocab_size, bool)
    legal[keys] = False
    legal = np.flatnonzero(legal).astype(np.int32)
    return legal[rng.integers(legal.size, size=self.seq_len)]


@functools.lru_cache(maxsize=16)
def gap_log_probabilities(space: int, power_a: float) -> np.ndarray:
  """Unnormalized log probability of each of the `space` gaps."""
  return (power_a - 1) * np.log(np.arange(1, space + 1))
