"""Copying: say again a string of random symbols after a separator."""

import dataclasses

import numpy as np

from longctx.tasks.checks import Natural, Positive, large_enough
from longctx.tasks.task import Example, Task, scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying(Task):
  """Copying: a random string, a separator, the string again, which is scored.

  Symbols are 1 ... num_symbols, the separator is 0 and so is the padding. Three
  symbols, T = 9:

    position  0  1  2  3  4  5  6  7  8
    tokens    7  2  9  0  7  2  9  0  0
    labels    2  9  0  7  2  9  0  0  0
    weights   0  0  0  1  1  1  0  0  0

  Paper: Transformers are RNNs (Katharopoulos et al., 2020,
  https://arxiv.org/abs/2006.16236): 10 symbols, at most 128 tokens. The
  published code draws the string's length uniformly from T // 4 to
  (T - 1) // 2 - 1, the default here. Its loss also counts the separator, which
  cannot be predicted, and the first padding after the copy; here the copied
  symbols alone are scored.

  Chance is 1 / num_symbols: the symbols are independent and uniform. The
  ceiling is 1: the answer at position t is the symbol t - (string length).

  Attributes:
    num_symbols: number of different symbols.
    min_length: shortest string; 0: seq_len // 4.
    max_length: longest string, 2 * max_length + 1 <= seq_len; 0: the larger of
      (seq_len - 1) // 2 - 1 and the shortest.
  """

  seq_len: Positive = 128
  num_symbols: Positive = 10
  min_length: Natural = 0
  max_length: Natural = 0

  def check(self):
    low, high = self.lengths
    if not 1 <= low <= high:
      raise ValueError(
        f'string lengths from {low} to {high}: they need '
        f'1 <= min_length <= max_length at seq_len={self.seq_len}'
      )
    large_enough(
      self, 'seq_len', 2 * high + 1, f'two strings of {high} and a separator'
    )

  @property
  def lengths(self) -> tuple[int, int]:
    """Shortest and longest string."""
    low = self.min_length or max(1, self.seq_len // 4)
    return low, self.max_length or max(low, (self.seq_len - 1) // 2 - 1)

  @property
  def vocab_size(self) -> int:
    return self.num_symbols + 1

  @property
  def chance(self) -> float:
    return 1 / self.num_symbols

  def example(self, rng: np.random.Generator) -> Example:
    low, high = self.lengths
    n = int(rng.integers(low, high + 1))
    string = rng.integers(1, self.num_symbols + 1, size=n, dtype=np.int32)
    tokens = np.zeros(self.seq_len, np.int32)
    tokens[:n] = string
    tokens[n + 1 : 2 * n + 1] = string
    return scored(tokens, slice(n, 2 * n))

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The first 0 is the separator; the string before it comes again."""
    length = int(np.argmin(tokens))
    repeated = np.roll(tokens[:length], -length)
    return np.resize(repeated, self.seq_len + length)[: self.seq_len]
