"""N-gram lookup: find an n-gram in a string, and say what follows it."""

import dataclasses
from typing import Literal

import numpy as np

from longctx.tasks.checks import Natural, Positive
from longctx.tasks.task import Example, Task, next_token_labels, scored

PAD, BOS, SEP, FIRST_SYMBOL = 0, 1, 2, 3
KEYS = ('prefix', 'suffix')

# A key of at least as many n-grams as places is unique in more than one draw in
# ten, so this many draws in a row have probability below 1e-45.
MAX_DRAWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramLookup(Task):
  """N-gram lookup in a random string; the answer is how it goes on there.

  Tokens: 0 padding, 1 BOS, 2 the separator, then the symbols. With a suffix
  key the n-gram stands behind the string and is continued. String c a d b a e
  of length 6, key d b, answer a e, T = 14, `|` the separator, `.` padding:

    position  0   1  2  3  4  5  6  7  8  9  10 11 12 13
    tokens    BOS c  a  d  b  a  e  |  d  b  a  .  .  .
    labels                                a  e
    weights   0   0  0  0  0  0  0  0  0  1  1  0  0  0

  With a prefix key it stands before the string, so a model knows what to look
  for while it reads, and a state of fixed size may hold the answer:

    tokens    BOS d  b  |  c  a  d  b  a  e  |  a  .  .
    labels                                   a  e
    weights   0   0  0  0  0  0  0  0  0  0  1  1  0  0

  Paper: Repeat After Me (Jelassi et al., 2024,
  https://arxiv.org/abs/2402.01032), 26 letters: on strings longer than those
  of training, models of a fixed state answer prefix keys and fail at suffix
  keys. The published code also scores an end token after the answer, packs
  several examples into a context, and may draw a key that occurs more than
  once, of which it means the first. Here a key occurs once in its string.

  Chance is 1 / num_symbols: at every place of the answer each symbol is as
  likely as another. The ceiling is 1: the key occurs once, and the answer
  stands behind it.

  Attributes:
    num_symbols: number of different symbols.
    key_length: symbols of the key, the n of the n-gram.
    answer_length: symbols of the answer.
    key: 'suffix' or 'prefix', where the key stands.
    min_length: shortest string; 0: half of the longest.
    max_length: longest string; 0: the longest that fits.
  """

  seq_len: Positive = 64
  num_symbols: Positive = 26
  key_length: Positive = 3
  answer_length: Positive = 4
  key: Literal[KEYS] = 'suffix'
  min_length: Natural = 0
  max_length: Natural = 0

  def check(self):
    low, high = self.lengths
    if self.seq_len < high + self._overhead or high < self._shortest:
      high = max(high, self._shortest)
      raise ValueError(
        f'seq_len={self.seq_len} is too short for strings of {high} symbols '
        f'with key_length={self.key_length} and answer_length='
        f'{self.answer_length}: it needs seq_len >= {high + self._overhead}'
      )
    if not self._shortest <= low <= high:
      raise ValueError(
        f'string lengths from {low} to {high}: they need '
        f'{self._shortest} <= min_length <= max_length for a key and its answer'
      )
    places = high - self.key_length + 1
    # No string is as long as 2**64.
    if self.num_symbols ** min(self.key_length, 64) < places:
      raise ValueError(
        f'num_symbols={self.num_symbols} and key_length={self.key_length} make '
        f'too few keys to be unique among the {places} of a string of {high} '
        f'symbols: raise one of them until num_symbols**key_length >= {places}'
      )

  @property
  def lengths(self) -> tuple[int, int]:
    """Shortest and longest string."""
    high = self.max_length or self.seq_len - self._overhead
    return self.min_length or max(self._shortest, high // 2), high

  @property
  def _shortest(self) -> int:
    return self.key_length + self.answer_length

  @property
  def _overhead(self) -> int:
    """Tokens beside the string: markers, key, all but the answer's last."""
    num_markers = {'suffix': 2, 'prefix': 3}[self.key]
    return num_markers + self.key_length + self.answer_length - 1

  @property
  def vocab_size(self) -> int:
    return FIRST_SYMBOL + self.num_symbols

  @property
  def chance(self) -> float:
    return 1 / self.num_symbols

  def example(self, rng: np.random.Generator) -> Example:
    low, high = self.lengths
    length = int(rng.integers(low, high + 1))
    string, place = self._draw(rng, length)
    begin = place + self.key_length
    key = string[place:begin]
    answer = string[begin : begin + self.answer_length]
    parts = {
      'suffix': ([BOS], string, [SEP], key, answer),
      'prefix': ([BOS], key, [SEP], string, [SEP], answer),
    }
    whole = np.concatenate(parts[self.key])
    tokens = np.full(self.seq_len + 1, PAD, np.int32)
    tokens[: len(whole)] = whole
    labels = next_token_labels(tokens)[:-1]
    # The answer's last symbol is a label alone.
    tokens[len(whole) - 1] = PAD
    places = slice(len(whole) - 1 - self.answer_length, len(whole) - 1)
    return scored(tokens[:-1], places, labels=labels)

  def _draw(
    self, rng: np.random.Generator, length: int
  ) -> tuple[np.ndarray, int]:
    """A string and where in it a key stands that occurs nowhere else."""
    for _ in range(MAX_DRAWS):
      string = rng.integers(
        FIRST_SYMBOL, self.vocab_size, size=length, dtype=np.int32
      )
      place = int(rng.integers(length - self._shortest + 1))
      key = string[place : place + self.key_length]
      if len(_occurrences(string, key)) == 1:
        return string, place
    raise ValueError(
      f'{MAX_DRAWS} draws gave no string of {length} symbols with a key that '
      f'occurs once: raise num_symbols={self.num_symbols} or '
      f'key_length={self.key_length}'
    )

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """What follows the key where it stands in the string."""
    separators = np.flatnonzero(tokens == SEP)
    n = self.key_length
    if self.key == 'suffix':
      string = tokens[1 : separators[0]]
      asked = separators[0] + n
      key = tokens[asked - n + 1 : asked + 1]
    else:
      string = tokens[separators[0] + 1 : separators[1]]
      asked = separators[1]
      key = tokens[1 : 1 + n]
    begin = _occurrences(string, key)[0] + n
    answers = np.zeros_like(tokens)
    answers[asked : asked + self.answer_length] = string[
      begin : begin + self.answer_length
    ]
    return answers


def _occurrences(string: np.ndarray, key: np.ndarray) -> np.ndarray:
  """Where the key begins in the string."""
  places = len(string) - len(key) + 1
  same = np.ones(places, bool)
  for offset, symbol in enumerate(key):
    same &= string[offset : offset + places] == symbol
  return np.flatnonzero(same)
