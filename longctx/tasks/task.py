"""Task interface: examples addressable by (seed, split, index)."""

import abc
import dataclasses
import hashlib
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Int32

from longctx.tasks.checks import Positive
from longctx.typing import Checked

# Position in this tuple is part of every example's random seed.
SPLITS = ('train', 'validation', 'test')

# One draw in 16 is kept for validation, one for test, the others for training.
NUM_BUCKETS = 16
HELD_OUT = {0: 'validation', 1: 'test'}

# A split that exists at all holds a 1/16 share of the draws; to miss it this
# many times in a row has probability (15/16)**4096 < 1e-114.
MAX_ATTEMPTS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """Example of a task: tokens, labels and weights of the loss.

  Attributes:
    tokens: int32[T], what the model reads.
    labels: int32[T], labels[t] is what logits[t] should predict. Any shift is
      already made here.
    weights: float32[T], above 0 where the prediction is scored.
    segment_ids: int32[T] of the documents packed into the sequence, from 1 on,
      or None where the whole sequence is one document.
    relevant: bool[T], the tokens that the answers depend on, without the
      questions themselves; None where the task does not say.
  """

  tokens: Int32[np.ndarray, ' T']
  labels: Int32[np.ndarray, ' T']
  weights: Float32[np.ndarray, ' T']
  segment_ids: Int32[np.ndarray, ' T'] | None = None
  relevant: Bool[np.ndarray, ' T'] | None = None

  def arrays(self) -> dict[str, np.ndarray]:
    """The example as a dict, without what is None."""
    fields = ('tokens', 'labels', 'weights', 'segment_ids', 'relevant')
    arrays = {name: getattr(self, name) for name in fields}
    return {k: v for k, v in arrays.items() if v is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Checked, abc.ABC):
  """Task: a distribution over examples, cut into splits that share none.

  A draw belongs to the split that the hash of its tokens names, so an example
  cannot be in two splits even where only few different ones exist. `get` draws
  until the split is hit: 1.14 draws on average for training, 16 for the others.

  Attributes:
    seq_len: length T of every example.
  """

  prefix: ClassVar[str] = 'task.'

  seq_len: Positive

  @property
  @abc.abstractmethod
  def vocab_size(self) -> int:
    """Tokens and labels are below this number."""

  @property
  @abc.abstractmethod
  def chance(self) -> float:
    """Accuracy of the best guess that ignores the context."""

  @property
  def ceiling(self) -> float:
    """Best accuracy that any model can reach."""
    return 1.0

  @property
  def text_digest(self) -> str:
    """Tells the text that examples are cut from; '' where fields say all."""
    return ''

  @property
  def byte_counts(self) -> Int32[np.ndarray, ' V'] | None:
    """Bytes of text that each label stands for; None where it is no text."""
    return None

  @abc.abstractmethod
  def example(self, rng: np.random.Generator) -> Example:
    """Draws one example, of whichever split."""

  @abc.abstractmethod
  def solve(self, tokens: Int32[np.ndarray, ' T']) -> Int32[np.ndarray, ' T']:
    """Answers from the tokens alone: the proof that the ceiling is reached.

    Returns:
      What logits[t] should predict; counts only where the weight is above 0.

    Raises:
      NotImplementedError: no rule answers this task.
    """

  def get(self, seed: int, split: str, index: int) -> Example:
    """Example `index` of a split: the same on any host and in any order.

    Raises:
      ValueError: unknown split, a negative seed or index, or a split without
        examples because the task has too few different ones.
    """
    split_id = check_address(seed, split, index)
    for attempt in range(MAX_ATTEMPTS):
      rng = np.random.default_rng([seed, split_id, index, attempt])
      example = self.example(rng)
      if split_of(example.tokens) == split:
        return example
    raise ValueError(
      f'{MAX_ATTEMPTS} draws gave no {split} example of {self}: it has too few '
      'different examples to share out; enlarge the vocabulary or the length'
    )


def check_address(seed: int, split: str, index: int) -> int:
  """Returns the split's number, or raises ValueError for a bad address."""
  if split not in SPLITS:
    raise ValueError(f'unknown {split=}; known: {", ".join(SPLITS)}')
  if seed < 0 or index < 0:
    raise ValueError(f'{seed=} and {index=} must not be negative')
  return SPLITS.index(split)


def split_of(content: np.ndarray | bytes) -> str:
  """The split that some content belongs to, by a hash that never changes."""
  digest = hashlib.blake2b(content, digest_size=8).digest()
  return HELD_OUT.get(int.from_bytes(digest, 'little') % NUM_BUCKETS, 'train')


def scored(
  tokens: Int32[np.ndarray, ' T'],
  places: slice | np.ndarray | list[int],
  *,
  labels: np.ndarray | None = None,
  answers: Any = None,
  relevant: np.ndarray | None = None,
) -> Example:
  """The example whose predictions count at some places, with weight 1.

  Labels are those given, or `answers` at those places and 0 elsewhere, or else
  the token after each. Relevant tokens are given by their places.
  """
  weights = np.zeros(len(tokens), np.float32)
  weights[places] = 1
  if relevant is not None:
    relevant = np.isin(np.arange(len(tokens)), relevant)
  if answers is not None:
    labels = np.zeros_like(tokens)
    labels[places] = answers
  if labels is None:
    labels = next_token_labels(tokens)
  return Example(
    tokens=tokens, labels=labels, weights=weights, relevant=relevant
  )


def filler_tokens(
  rng: np.random.Generator, first: int, last: int, size: int, *, repeat: bool
) -> Int32[np.ndarray, ' size']:
  """Filler from `first` to last - 1: random, or in order over and over."""
  if repeat:
    return np.resize(np.arange(first, last, dtype=np.int32), size)
  return rng.integers(first, last, size=size, dtype=np.int32)


def spread(
  rng: np.random.Generator, count: int, width: int, space: int
) -> np.ndarray:
  """Where spans of one width begin that lie apart, ascending, below `space`.

  Uniform among all ways to place them: drawn are places where each counts as
  one token.
  """
  shrunk = space - count * (width - 1)
  begins = rng.choice(shrunk, count, replace=False, shuffle=False)
  return np.sort(begins) + (width - 1) * np.arange(count)


def next_token_labels(tokens: Int32[np.ndarray, ' T']) -> np.ndarray:
  """labels[t] = tokens[t + 1]; the last one, never scored, is 0."""
  labels = np.zeros_like(tokens)
  labels[:-1] = tokens[1:]
  return labels
