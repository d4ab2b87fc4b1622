"""Passkey retrieval: recall a number hidden somewhere in a long filler."""

import dataclasses
from typing import Annotated, Literal

import numpy as np

from longctx.tasks.checks import Positive, large_enough
from longctx.tasks.task import (
  Example,
  Task,
  filler_tokens,
  next_token_labels,
  scored,
)
from longctx.typing import Between

BOS, KEY, QUERY, FIRST_SYMBOL = 0, 1, 2, 3
FILLERS = ('random', 'repeat')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Task):
  """Passkey of a few symbols after a KEY token, asked for at the end.

  Tokens: 0 BOS, 1 KEY, 2 QUERY, then num_symbols symbols, then filler up to the
  vocabulary's end. A key of three symbols a b c, T = 14, filler `.`:

    position  0   1  2  3  4   5  6  7  8  9 10  11    12 13
    tokens    BOS .  .  .  KEY a  b  c  .  .  .  QUERY a  b
    labels                                       a     b  c
    weights   0   0  0  0  0   0  0  0  0  0  0  1     1  1

  The symbols of a key are drawn without replacement, so that the symbol that
  follows another is never in doubt: the key is found once, by its marker, and
  then continued. Papers: Landmark Attention (Mohtashami and Jaggi, 2023,
  https://arxiv.org/abs/2305.16300), whose filler is one sentence repeated;
  the sweep over length and depth is that of later long-context evaluations.

  Chance is 1 / num_symbols: at every place of the key each symbol is as likely
  as another. The ceiling is 1: KEY occurs once and the key stands beside it.

  Attributes:
    vocab_size: all tokens; at least one of them is filler.
    num_symbols: number of different key symbols.
    key_length: symbols of a key, at most num_symbols.
    depth: where the key stands, from 0 (at the beginning) to 1 (just before the
      query), rounded to a position; a negative depth draws it uniformly.
    filler: 'random' tokens, or 'repeat', the filler tokens in order over and
      over.
  """

  seq_len: Positive = 256
  vocab_size: Positive = 64
  num_symbols: Positive = 10
  key_length: Positive = 5
  depth: Annotated[float, Between(-1, 1)] = -1.0
  filler: Literal[FILLERS] = 'random'

  def check(self):
    if self.key_length > self.num_symbols:
      raise ValueError(
        f'key_length={self.key_length} must be at most num_symbols='
        f'{self.num_symbols}: no symbol comes twice in a key'
      )
    # At least one token is filler.
    large_enough(self, 'vocab_size', self._first_filler + 1, 'num_symbols')
    large_enough(self, 'seq_len', 2 * self.key_length + 2, 'key_length')

  @property
  def _first_filler(self) -> int:
    return FIRST_SYMBOL + self.num_symbols

  @property
  def chance(self) -> float:
    return 1 / self.num_symbols

  def example(self, rng: np.random.Generator) -> Example:
    T, n = self.seq_len, self.key_length
    key = FIRST_SYMBOL + rng.permutation(self.num_symbols)[:n]
    depth = rng.random() if self.depth < 0 else self.depth
    query = T - n
    # KEY may stand anywhere from 1 to the last place that ends before QUERY.
    place = 1 + round(depth * (query - n - 2))
    tokens = filler_tokens(
      rng,
      self._first_filler,
      self.vocab_size,
      T,
      repeat=self.filler == 'repeat',
    )
    tokens[0] = BOS
    tokens[place] = KEY
    tokens[place + 1 : place + 1 + n] = key
    tokens[query] = QUERY
    tokens[query + 1 :] = key[:-1]
    labels = next_token_labels(tokens)
    labels[-1] = key[-1]
    return scored(tokens, slice(query, None), labels=labels)

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The answer is what stands after KEY."""
    key = tokens[np.flatnonzero(tokens == KEY)[0] + 1 :][: self.key_length]
    return np.concatenate([np.zeros(self.seq_len - len(key), int), key])
