"""Multi-needle retrieval: keys with values in a filler, some asked for."""

import dataclasses
from typing import Literal

import numpy as np

from longctx.tasks.checks import Positive, large_enough
from longctx.tasks.task import Example, Task, filler_tokens, scored, spread

BOS, NEEDLE, QUERY, FIRST_SYMBOL = 0, 1, 2, 3
FILLERS = ('random', 'repeat')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiNeedle(Task):
  """Needles in a haystack: keys with values at random places, then queries.

  Tokens: 0 BOS, 1 NEEDLE, 2 QUERY, then the symbols of values, then keys, then
  filler up to the vocabulary's end. Two needles p: a b and q: c a, both asked
  for, values of two symbols, T = 20, N NEEDLE, Q QUERY, filler `.`:

    position  0   1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19
    tokens    BOS .  N  p  a  b  .  .  N  q  c  a  .  Q  q  c  a  Q  p  a
    labels                                               c  a        a  b
    weights   0   0  0  0  0  0  0  0  0  0  0  0  0  0  1  1  0  0  1  1
    relevant  0   0  1  1  1  1  0  0  1  1  1  1  0  0  0  0  0  0  0  0

  After RULER's needle in a haystack (Hsieh et al., 2024,
  https://arxiv.org/abs/2404.06654) with many keys and many queries: needles
  that are not asked for distract from the others. There keys are words or
  UUIDs, values numbers of seven digits and the filler essays, one sentence
  repeated, or more needles. `passkey` has one needle, without a key.

  Chance is 1 / num_symbols: at every place of a value each symbol is as likely
  as another. The ceiling is 1: no two needles share a key.

  Attributes:
    vocab_size: all tokens; at least one of them is filler.
    num_symbols: number of different symbols of values.
    num_keys: number of different keys.
    num_needles: needles of an example.
    num_queries: how many of them are asked for, in an order of their own.
    value_length: symbols of a value.
    filler: 'random' tokens, or 'repeat', the filler tokens in order over and
      over.
  """

  seq_len: Positive = 64
  vocab_size: Positive = 64
  num_symbols: Positive = 10
  num_keys: Positive = 32
  num_needles: Positive = 4
  num_queries: Positive = 2
  value_length: Positive = 4
  filler: Literal[FILLERS] = 'random'

  def check(self):
    if not 1 <= self.num_queries <= self.num_needles <= self.num_keys:
      raise ValueError(
        f'num_queries={self.num_queries}, num_needles={self.num_needles} and '
        f'num_keys={self.num_keys} must satisfy '
        '1 <= num_queries <= num_needles <= num_keys'
      )
    # At least one token is filler.
    sizes = ('num_symbols', 'num_keys')
    large_enough(self, 'vocab_size', self._first_filler + 1, *sizes)
    smallest = (self.num_needles + self.num_queries) * (self.value_length + 2)
    needles = ('num_needles', 'num_queries', 'value_length')
    large_enough(self, 'seq_len', smallest, *needles)

  @property
  def _first_key(self) -> int:
    return FIRST_SYMBOL + self.num_symbols

  @property
  def _first_filler(self) -> int:
    return self._first_key + self.num_keys

  @property
  def chance(self) -> float:
    return 1 / self.num_symbols

  def example(self, rng: np.random.Generator) -> Example:
    T, n, m = self.seq_len, self.num_needles, self.num_queries
    width = self.value_length + 2
    needles = np.empty((n, width), np.int32)
    needles[:, 0] = NEEDLE
    needles[:, 1] = self._first_key + rng.permutation(self.num_keys)[:n]
    needles[:, 2:] = FIRST_SYMBOL + rng.integers(
      self.num_symbols, size=(n, self.value_length)
    )
    asked = rng.permutation(n)[:m]
    queries = needles[asked]
    queries[:, 0] = QUERY

    # The last symbol of the last answer is a label alone, so that BOS, needles,
    # filler and queries fill T + 1 places.
    first_query = T + 1 - m * width
    begins = 1 + spread(rng, n, width, first_query - 1)
    repeat = self.filler == 'repeat'
    tokens = filler_tokens(
      rng, self._first_filler, self.vocab_size, T + 1, repeat=repeat
    )
    tokens[0] = BOS
    tokens[begins[:, None] + np.arange(width)] = needles
    tokens[first_query:] = queries.ravel()
    # An answer is predicted from its key and from all its symbols but the last.
    places = np.arange(first_query, T + 1).reshape(m, width)[:, 1:-1]
    relevant = begins[asked, None] + np.arange(width)
    return scored(
      tokens[:-1], places.ravel(), labels=tokens[1:], relevant=relevant
    )

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The value of the needle with the query's key."""
    offsets = np.arange(self.value_length)
    places = np.flatnonzero(tokens == NEEDLE)
    values = dict(
      zip(
        tokens[places + 1], tokens[places[:, None] + 2 + offsets], strict=True
      )
    )
    answers = np.zeros_like(tokens)
    for place in np.flatnonzero(tokens == QUERY):
      answers[place + 1 + offsets] = values[tokens[place + 1]]
    return answers
