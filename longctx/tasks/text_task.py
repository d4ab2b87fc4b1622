"""Text tasks: windows of real text, whatever its tokens."""

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Int32, Shaped

from longctx.tasks.checks import Positive
from longctx.tasks.documents import stdlib_folder
from longctx.tasks.task import Example, Task, check_address


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask(Task):
  """Text task: predict the next token in a window of the text's own stream.

  Attributes:
    path: a file or folder of any content; empty: the standard library.
    tfds_name: a TFDS dataset to read in place of `path`, as 'name' or
      'name/config'.
    tfds_data_dir: where TFDS keeps its datasets; empty: its default.
    packed: give segment_ids, so that no document sees another.
    prepend_bos: begin every window with BOS instead of its first token's
      predecessor, as an anchor that is always there.
  """

  # What a token is called in messages.
  unit: ClassVar[str] = 'tokens'

  seq_len: Positive = 256
  path: str = ''
  tfds_name: str = ''
  tfds_data_dir: str = ''
  packed: bool = False
  prepend_bos: bool = False

  def check(self):
    if self.path and self.tfds_name:
      raise ValueError(
        f'path={self.path!r} and tfds_name={self.tfds_name!r} are both set: '
        'the text comes from one of them'
      )

  @property
  @abc.abstractmethod
  def bos(self) -> int:
    """The token that stands before every document."""

  @abc.abstractmethod
  def text(self, split: str) -> Shaped[np.ndarray, ' S']:
    """All tokens of a split, BOS before each document."""

  @abc.abstractmethod
  def weights(self, labels: Int[np.ndarray, '*T']) -> np.ndarray:
    """1 where a label is scored."""

  @property
  @abc.abstractmethod
  def stop_tokens(self) -> tuple[int, ...]:
    """Tokens after which a generated text has ended."""

  @abc.abstractmethod
  def encode(self, prompt: str) -> list[int]:
    """Tokens of a prompt, which begins as texts of training do."""

  @abc.abstractmethod
  def decode(
    self, tokens: Iterable[int], prompt: Sequence[int]
  ) -> Iterator[bytes]:
    """Yields the text of tokens as they come after a prompt."""

  def example(self, rng: np.random.Generator) -> Example:
    return self._window(rng, 'train')

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    raise NotImplementedError('no rule predicts text')

  def get(self, seed: int, split: str, index: int) -> Example:
    """A random window of the split's own documents."""
    split_id = check_address(seed, split, index)
    return self._window(np.random.default_rng([seed, split_id, index]), split)

  def _window(self, rng: np.random.Generator, split: str) -> Example:
    text = self.text(split)
    start = int(rng.integers(len(text) - self.seq_len))
    stream = text[start : start + self.seq_len + 1].astype(np.int32)
    if self.prepend_bos:
      stream[0] = self.bos
    tokens, labels = stream[:-1], stream[1:]
    return Example(
      tokens=tokens,
      labels=labels,
      weights=self.weights(labels),
      segment_ids=self._segment_ids(tokens) if self.packed else None,
    )

  def _segment_ids(self, tokens: Int32[np.ndarray, ' T']) -> np.ndarray:
    segment_ids = 1 + np.cumsum(tokens == self.bos, dtype=np.int32)
    # A window that begins with BOS begins with document 1 all the same.
    return segment_ids - (segment_ids[0] - 1)

  def _check_length(self, split: str, text: np.ndarray):
    """Refuses a split without a whole window."""
    if len(text) < self.seq_len + 1:
      raise ValueError(
        f'the {split} split of {self._origin()} has {len(text)} {self.unit}, '
        f'fewer than seq_len + 1 = {self.seq_len + 1}: give a shorter '
        'seq_len, more text, or a single file, which is split by regions'
      )

  def _origin(self) -> str:
    return self.tfds_name or self.path or str(stdlib_folder())


def commonest_share(
  text: Shaped[np.ndarray, ' S'], vocab_size: int, unscored: int | None
) -> float:
  """Share of the commonest token among those of a text that are scored."""
  counts = np.zeros(vocab_size, np.int64)
  # In pieces, because bincount makes int64 of what may be a file on disk.
  for start in range(0, len(text), 2**24):
    part = text[start : start + 2**24]
    counts += np.bincount(part, minlength=vocab_size)
  if unscored is not None:
    counts[unscored] = 0
  return float(counts.max() / counts.sum())
