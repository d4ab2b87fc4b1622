"""MultiNeedle: several keys with values in a filler, some of them asked for."""

import dataclasses

import numpy as np

from longctx.tasks.task import Example, Task, next_token_labels

BOS, NEEDLE, QUERY, FIRST_SYMBOL = 0, 1, 2, 3
FILLERS = ('random', 'repeat')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiNeedle(Task):
  """Needles with a key and a value at random places, then queries by key.

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

  seq_len: int = 64
  vocab_size: int = 64
  num_symbols: int = 10
  num_keys: int = 32
  num_needles: int = 4
  num_queries: int = 2
  value_length: int = 4
  filler: str = 'random'

  def __post_init__(self):
    if self.filler not in FILLERS:
      raise ValueError(
        f'unknown filler={self.filler!r}; known: {", ".join(FILLERS)}'
      )
    for name in ('num_symbols', 'value_length'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if not 1 <= self.num_queries <= self.num_needles <= self.num_keys:
      raise ValueError(
        f'num_queries={self.num_queries}, num_needles={self.num_needles} and '
        f'num_keys={self.num_keys} must satisfy '
        '1 <= num_queries <= num_needles <= num_keys'
      )
    if self.vocab_size <= self._first_filler:
      raise ValueError(
        f'vocab_size={self.vocab_size} leaves no filler token beside '
        f'num_symbols={self.num_symbols}, num_keys={self.num_keys} and BOS, '
        f'NEEDLE, QUERY: it needs vocab_size >= {self._first_filler + 1}'
      )
    smallest = (self.num_needles + self.num_queries) * (self.value_length + 2)
    if self.seq_len < smallest:
      raise ValueError(
        f'seq_len={self.seq_len} is too short for num_needles='
        f'{self.num_needles} and num_queries={self.num_queries} with '
        f'value_length={self.value_length}: they need seq_len >= {smallest}'
      )

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
    # filler and queries fill T + 1 places. Drawn are the needles' places where
    # each counts as one.
    first_query = T + 1 - m * width
    gaps = rng.choice(
      first_query - 1 - n * (width - 1), n, replace=False, shuffle=False
    )
    begins = 1 + np.sort(gaps) + (width - 1) * np.arange(n)
    tokens = self._filler(rng)
    tokens[0] = BOS
    tokens[begins[:, None] + np.arange(width)] = needles
    tokens[first_query:] = queries.ravel()
    weights = np.zeros(T + 1, np.float32)
    # An answer is predicted from its key and from all its symbols but the last.
    weights[first_query:].reshape(m, width)[:, 1:-1] = 1
    relevant = np.zeros(T, bool)
    relevant[begins[asked, None] + np.arange(width)] = True
    return Example(
      tokens=tokens[:-1],
      labels=next_token_labels(tokens)[:-1],
      weights=weights[:-1],
      relevant=relevant,
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

  def _filler(self, rng: np.random.Generator) -> np.ndarray:
    """int32[T + 1] of filler, to be overwritten by everything else."""
    first, last, size = self._first_filler, self.vocab_size, self.seq_len + 1
    if self.filler == 'repeat':
      return np.resize(np.arange(first, last, dtype=np.int32), size)
    return rng.integers(first, last, size=size, dtype=np.int32)
