"""Repeated random sequences, by which induction heads are found."""

import dataclasses

import numpy as np

from longctx.typing import Bool, Int

# With P symbols a head that attends to all tokens alike matches a share 1 / P,
# and with two of them the token behind the last occurrence is the one before.
SHORTEST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
  """Tokens, and what heads could match them by.

  Attributes:
    tokens: int32[B, T].
    symbols: int32[C], the different tokens.
    classes: int32[B, T] below C: symbols[classes] is tokens.
    previous: int32[B, T], the class of the token before; C at the first one.
    seen: whether the token came before in its row.
  """

  tokens: Int[np.ndarray, 'B T']
  symbols: Int[np.ndarray, ' C']
  classes: Int[np.ndarray, 'B T']
  previous: Int[np.ndarray, 'B T']
  seen: Bool[np.ndarray, 'B T']

  @classmethod
  def of(cls, tokens: Int[np.ndarray, 'B T']) -> 'Sequences':
    """Finds what repeats in some tokens."""
    symbols, classes = np.unique(tokens, return_inverse=True)
    classes = classes.reshape(tokens.shape).astype(np.int32)
    previous = np.full_like(classes, len(symbols))
    previous[:, 1:] = classes[:, :-1]
    seen = np.ones(tokens.shape, bool)
    for row, of_row in enumerate(classes):
      seen[row, np.unique(of_row, return_index=True)[1]] = False
    return cls(
      tokens=tokens.astype(np.int32),
      symbols=symbols.astype(np.int32),
      classes=classes,
      previous=previous,
      seen=seen,
    )


def repeated(
  symbols: Int[np.ndarray, ' S'],
  *,
  rows: int,
  seq_len: int,
  period: int = 25,
  repeats: int = 4,
  first: int | None = None,
  seed: int = 0,
) -> Sequences:
  """Different random symbols, again and again, as Olsson et al. probe heads.

  In 'In-context Learning and Induction Heads' (arXiv:2209.11895): 25 tokens,
  four times, behind a first token that is always the same. Nothing but order
  tells which token comes next.

  Args:
    symbols: to choose from, for each row anew; fewer than `period` shorten it.
    rows: sequences B.
    seq_len: the longest that the model takes; the period is at most half of it.
    period: different symbols of a row.
    repeats: how often they come, where `seq_len` has room.
    first: the token at the beginning; None for none.
    seed: of the choice.

  Raises:
    ValueError: symbols or room for a period below 8.
  """
  begins = first is not None
  symbols = np.setdiff1d(symbols, [first] if begins else [])
  period = min(period, len(symbols), (seq_len - begins) // 2)
  if period < SHORTEST:
    raise ValueError(
      f'{len(symbols)} symbols in {seq_len=} leave a period of {period}, and '
      f'below {SHORTEST} attention to all tokens alike matches many prefixes'
    )
  length = min(begins + period * repeats, seq_len)
  rng = np.random.default_rng(seed)
  tokens = np.zeros((rows, length), np.int32)
  for row in tokens:
    if begins:
      row[0] = first
    row[begins:] = np.resize(rng.permutation(symbols)[:period], length - begins)
  return Sequences.of(tokens)
