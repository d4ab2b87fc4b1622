"""Selective copying: gather the symbols strewn among noise, in order."""

import dataclasses

import numpy as np

from longctx.tasks.checks import Positive, large_enough
from longctx.tasks.task import Example, Task, scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
  """Selective copying: symbols strewn in noise, then markers that ask for them.

  Noise is 0, symbols are 1 ... num_symbols, the marker M is num_symbols + 1.
  Three symbols to keep, T = 12:

    position  0  1  2  3  4  5  6  7  8  9 10 11
    tokens    0  5  0  0  2  0  0  5  0  M  M  M
    labels                               5  2  5
    weights   0  0  0  0  0  0  0  0  0  1  1  1

  The answers are never read back: marker i asks for symbol i, so a model must
  count. Paper: Mamba (Gu and Dao, 2023, https://arxiv.org/abs/2312.00752),
  there with 16 symbols kept among 4096 tokens and a vocabulary of 16, which is
  num_symbols = 14.

  Chance is 1 / num_symbols: the symbols are independent and uniform. The
  ceiling is 1: the symbols that are not noise, read in order, are the answer.

  Attributes:
    num_symbols: number of different symbols.
    num_kept: how many symbols to keep; 2 * num_kept <= seq_len.
  """

  seq_len: Positive = 256
  num_symbols: Positive = 14
  num_kept: Positive = 16

  def check(self):
    large_enough(self, 'seq_len', 2 * self.num_kept, 'num_kept')

  @property
  def vocab_size(self) -> int:
    return self.num_symbols + 2

  @property
  def chance(self) -> float:
    return 1 / self.num_symbols

  def example(self, rng: np.random.Generator) -> Example:
    T, n = self.seq_len, self.num_kept
    symbols = rng.integers(1, self.num_symbols + 1, size=n, dtype=np.int32)
    places = np.sort(rng.choice(T - n, size=n, replace=False, shuffle=False))
    tokens = np.zeros(T, np.int32)
    tokens[places] = symbols
    tokens[T - n :] = self.num_symbols + 1
    return scored(tokens, slice(T - n, None), answers=symbols)

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """Marker i asks for the i-th token that is neither noise nor marker."""
    marker = self.num_symbols + 1
    symbols = tokens[(tokens > 0) & (tokens < marker)]
    asked = tokens == marker
    return np.where(asked, symbols[np.cumsum(asked) - 1], 0)
