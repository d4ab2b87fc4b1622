"""Language modelling of real text, byte by byte."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from longctx.tasks.documents import (
  Document,
  add_pieces,
  read_documents,
  single_file,
  split_file,
)
from longctx.tasks.task import SPLITS
from longctx.tasks.text_task import TextTask, commonest_share

BOS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesLM(TextTask):
  """Byte-level language modelling: predict the next byte of real text.

  Tokens 0 ... 255 are bytes, 256 (BOS) stands before every document. A window
  of T = 10 over the end of one document and the beginning of the next:

    position     0  1  2  3  4   5  6  7  8  9
    tokens       u  r  n  1  \\n  BOS i  m  p  o
    labels       r  n  1  \\n BOS i   m  p  o  r
    weights      1  1  1  1  0   1  1  1  1  1
    segment_ids  1  1  1  1  1   2  2  2  2  2     (packed=True)

  A window begins anywhere. BOS is never scored, so that the mean loss in nats,
  over ln 2, is exactly the bits per byte of text.

  Where the text comes from:
    default: the Python standard library's own source files on this machine,
      some 10 MB of code and English;
    a folder: its files, hidden ones left out; a file's split follows from the
      hash of its path within the folder, and of files with equal content only
      the first counts, so no document is in two splits;
    a file: one document, cut into three contiguous regions of 14/16, 1/16 and
      1/16; it is memory-mapped and may be larger than memory;
    a TFDS dataset with a text feature: a document's split follows from the hash
      of its content.

  Chance is the share of the commonest byte of the training split, which is the
  best constant guess. The ceiling is not known; 1 is a bound that no model
  reaches.
  """

  unit: ClassVar[str] = 'bytes'

  def check(self):
    super().check()
    for split in SPLITS:
      self._check_length(split, self.text(split))

  @property
  def vocab_size(self) -> int:
    return 257

  @property
  def byte_counts(self) -> np.ndarray:
    return (np.arange(257) != BOS).astype(np.int32)

  @property
  def bos(self) -> int:
    return BOS

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    return (BOS,)

  @property
  def chance(self) -> float:
    return _chance(self.path, self.tfds_name, self.tfds_data_dir)

  @property
  def text_digest(self) -> str:
    return digest_text(self.path, self.tfds_name, self.tfds_data_dir)

  def text(self, split: str) -> np.ndarray:
    return load_text(self.path, self.tfds_name, self.tfds_data_dir)[split]

  def weights(self, labels: np.ndarray) -> np.ndarray:
    """Where a document begins nothing is predicted."""
    return (labels != BOS).astype(np.float32)

  def encode(self, prompt: str) -> list[int]:
    """Bytes, after BOS where windows may begin with it.

    In a single file they do not, and a model that has never read BOS goes on
    worse from it.
    """
    starts = self.prepend_bos or bool(self.text('train')[0] == BOS)
    return [BOS] * starts + list(prompt.encode())

  def decode(
    self, tokens: Iterable[int], prompt: Sequence[int]
  ) -> Iterator[bytes]:
    del prompt
    return (bytes([token]) for token in tokens)


@functools.lru_cache(maxsize=8)
def load_text(
  path: str, tfds_name: str, tfds_data_dir: str
) -> dict[str, np.ndarray]:
  """The text of every split as one array of tokens, kept for the process."""
  if file := single_file(path, tfds_name):
    return split_file(file)
  return join_documents(read_documents(path, tfds_name, tfds_data_dir))


@functools.lru_cache(maxsize=8)
def _chance(path: str, tfds_name: str, tfds_data_dir: str) -> float:
  text = load_text(path, tfds_name, tfds_data_dir)['train']
  return commonest_share(text, 257, BOS)


@functools.lru_cache(maxsize=8)
def digest_text(path: str, tfds_name: str, tfds_data_dir: str) -> str:
  """Digest of the text: of its lengths and all of it, or of 4,096 pieces."""
  digest = hashlib.blake2b(digest_size=8)
  for split, text in load_text(path, tfds_name, tfds_data_dir).items():
    digest.update(f'{split} {len(text)} '.encode())
    add_pieces(digest, text)
  return digest.hexdigest()


def join_documents(documents: Iterable[Document]) -> dict[str, np.ndarray]:
  """Joins documents into one array of tokens per split, BOS before each."""
  parts = {split: [np.zeros(0, np.uint16)] for split in SPLITS}
  for split, _, text in documents:
    tokens = np.full(len(text) + 1, BOS, np.uint16)
    tokens[1:] = np.frombuffer(text, np.uint8)
    parts[split].append(tokens)
  return {split: np.concatenate(arrays) for split, arrays in parts.items()}
