"""Phone book lookup: read names with numbers, then say the number of one."""

import dataclasses

import numpy as np

from longctx.tasks.checks import Natural, Positive, large_enough
from longctx.tasks.task import Example, Task, next_token_labels, scored

PAD, ENTRY, COLON, QUERY, FIRST_DIGIT, FIRST_LETTER = 0, 1, 2, 3, 4, 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhoneBook(Task):
  """Phone book of names and numbers, then a name whose number is asked for.

  Tokens: 0 padding, 1 before an entry, 2 between a name and its number, 3
  before the query, then the ten digits, then the letters of names. Two entries
  with names and numbers of two symbols, T = 18, `E` and `Q` the markers, `:`
  the colon, `.` padding:

    position  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17
    tokens    E  a  b  :  1  7  E  b  b  :  4  0  Q  a  b  :  1  .
    labels                                                 1  7
    weights   0  0  0  0  0  0  0  0  0  0  0  0  0  0  0  1  1  0

  Paper: Repeat After Me (Jelassi et al., 2024,
  https://arxiv.org/abs/2402.01032), where pretrained models read a book of
  real names with numbers of ten digits, two of its entries once more as
  examples, and the question. A model that is trained on the task needs no
  examples, so there are none here.

  Chance is 1 / 10 at every digit: numbers are independent and uniform. The
  ceiling is 1: no two entries share a name.

  Attributes:
    num_letters: number of different letters.
    name_length: letters of a name.
    number_length: digits of a number.
    num_entries: entries of the book; 0: as many as fit.
  """

  seq_len: Positive = 64
  num_letters: Positive = 26
  name_length: Positive = 3
  number_length: Positive = 4
  num_entries: Natural = 0

  def check(self):
    # The last digit of the answer is a label alone.
    fewest = max(self.num_entries, 1)
    large_enough(
      self,
      'seq_len',
      (fewest + 1) * self._width - 1,
      f'a book of {fewest} entries',
      'name_length',
      'number_length',
    )
    if not self.entries <= self._num_names < 2**63:
      raise ValueError(
        f'num_letters={self.num_letters} and name_length={self.name_length} '
        f'make {self._num_names} names: they must be at least the '
        f'{self.entries} entries and fewer than 2**63'
      )

  @property
  def entries(self) -> int:
    """Entries of the book."""
    return self.num_entries or (self.seq_len + 1) // self._width - 1

  @property
  def _width(self) -> int:
    """Tokens of an entry."""
    return self.name_length + self.number_length + 2

  @property
  def _num_names(self) -> int:
    # That there are too many is seen at 2**64.
    return self.num_letters ** min(self.name_length, 64)

  @property
  def vocab_size(self) -> int:
    return FIRST_LETTER + self.num_letters

  @property
  def chance(self) -> float:
    return 1 / 10

  def example(self, rng: np.random.Generator) -> Example:
    n, width = self.entries, self._width
    # A name as digits of a number, so that to draw numbers without replacement
    # is to draw names.
    names = rng.choice(self._num_names, n, replace=False)
    places = self.num_letters ** np.arange(self.name_length)
    lines = np.empty((n + 1, width), np.int32)
    lines[:, 0] = ENTRY
    lines[:n, 1 : 1 + self.name_length] = (
      FIRST_LETTER + names[:, None] // places % self.num_letters
    )
    lines[:, 1 + self.name_length] = COLON
    lines[:n, 2 + self.name_length :] = rng.integers(
      FIRST_DIGIT, FIRST_LETTER, size=(n, self.number_length)
    )
    lines[n] = lines[int(rng.integers(n))]
    lines[n, 0] = QUERY

    end = lines.size - 1
    tokens = np.full(self.seq_len, PAD, np.int32)
    tokens[:end] = lines.ravel()[:-1]
    labels = next_token_labels(tokens)
    labels[end - 1] = lines[n, -1]
    places = slice(end - self.number_length, end)
    return scored(tokens, places, labels=labels)

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The number in the entry that has the query's name."""
    query = int(np.flatnonzero(tokens == QUERY)[0])
    book = tokens[:query].reshape(-1, self._width)
    name = slice(1, 1 + self.name_length)
    asked = (book[:, name] == tokens[query:][name]).all(axis=1)
    answers = np.zeros_like(tokens)
    begin = query + 1 + self.name_length
    answers[begin : begin + self.number_length] = book[
      asked, 2 + self.name_length :
    ][0]
    return answers
