"""Token stream: a split of a task without an end."""

import dataclasses
from typing import NamedTuple

import numpy as np

from longctx.tasks import Task
from longctx.tasks.text_task import TextTask


class Piece(NamedTuple):
  """Piece of a token stream, [rows, count] each, as in `tasks.Example`."""

  tokens: np.ndarray
  labels: np.ndarray
  weights: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStream:
  """Token stream without an end, addressable by position.

  Text is read from `rows` places on and begins anew where it ends. Of any other
  task it is one example after another.
  """

  task: Task
  split: str
  seed: int
  rows: int

  def take(self, begin: int, count: int, *, anew: bool = False) -> Piece:
    """Tokens at positions begin, …, begin + count - 1.

    Args:
      begin: the first position.
      count: how many.
      anew: whether a model reads on from nothing, as at position 0: the first
        token is then BOS where that is how the task's text begins.
    """
    if isinstance(self.task, TextTask):
      piece = self._take_text(begin, count)
      if self.task.prepend_bos and (anew or begin == 0):
        piece.tokens[:, 0] = self.task.bos
      return piece
    T = self.task.seq_len
    indices = range(begin // T, -(-(begin + count) // T))
    rows = [
      [
        self.task.get(self.seed, self.split, self.rows * index + row)
        for index in indices
      ]
      for row in range(self.rows)
    ]
    inside = slice(begin % T, begin % T + count)

    def join(name):
      joined = [
        np.concatenate([getattr(e, name) for e in examples])[inside]
        for examples in rows
      ]
      return np.stack(joined)

    return Piece(join('tokens'), join('labels'), join('weights'))

  def _take_text(self, begin: int, count: int) -> Piece:
    text = self.task.text(self.split)
    starts = np.arange(self.rows) * (len(text) // self.rows)
    places = starts[:, None] + begin + np.arange(count + 1)
    taken = text[places % len(text)].astype(np.int32)
    labels = taken[:, 1:]
    return Piece(taken[:, :-1], labels, self.task.weights(labels))
