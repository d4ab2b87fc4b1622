"""Language modelling of real text, token by token of any tokenizer."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from longctx.tasks.documents import (
  Document,
  cache_folder,
  digest_documents,
  read_documents,
)
from longctx.tasks.task import SPLITS
from longctx.tasks.text_task import TextTask, commonest_share
from longctx.tasks.tokenizer import Tokenizer

# Bytes of a document that are tokenized as one string, and of strings at once.
PART, AT_ONCE = 2**20, 2**22

# Of what the cache holds: other contents of the same text take another one.
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLM(TextTask):
  """Language modelling in tokens: predict the next token of real text.

  Documents are tokenized on their own and joined, as models are pretrained: a
  separator stands before each. It is BOS, and EOS ends each document, where the
  tokenizer begins texts with BOS (Llama, Gemma); else it is EOS alone (GPT-2,
  Qwen), or the one named here. A window of T = 9 with EOS alone:

    position     0    1   2    3    4     5   6    7    8
    tokens       urn  _   1    \\n   EOS   im  port _    os
    labels       _    1   \\n   EOS  im    port _   os   \\n
    weights      1    1   1    1    1     1   1    1    1
    segment_ids  1    1   1    1    2     2   2    2    2     (packed=True)

  A window begins anywhere. Every label is scored, EOS too, so that a model
  learns to end; but not a BOS that follows EOS, which nothing predicts. In
  packed windows the first token of a document is predicted from its separator
  alone. What is written as a special token in a document is plain text there.

  Evaluations report bits per byte: all nats, those of EOS too, over ln 2 and
  over the bytes of text that the scored tokens stand for, as the tokenizer
  normalises it. So models of different tokenizers compare, and with `bytes_lm`.

  Text comes from the same places as that of `bytes_lm`, and has to be UTF-8.
  It is tokenized once, into $LONGCTX_CACHE or ~/.cache/longctx, by the digest
  of text and tokenizer.

  Chance is the share of the commonest token. The ceiling is not known; 1 is a
  bound that no model reaches.

  Attributes:
    tokenizer: a tokenizer.json, or the folder that holds it.
    separator: the special token between documents, such as '<|endoftext|>';
      empty: BOS or EOS of the tokenizer.
  """

  tokenizer: str = ''
  separator: str = ''

  def check(self):
    super().check()
    if not self.tokenizer:
      raise ValueError(
        'task.tokenizer is empty: text_lm needs a tokenizer.json, or a folder '
        'that holds it; bytes_lm needs none'
      )
    _ = self.marks

  @property
  def codec(self) -> Tokenizer:
    """The tokenizer itself."""
    return load_tokenizer(self.tokenizer)

  @property
  def marks(self) -> 'Marks':
    codec = self.codec
    if self.separator:
      token = codec.backend.token_to_id(self.separator)
      if token is None:
        raise ValueError(
          f'separator={self.separator!r} is no token of {self.tokenizer}'
        )
      return Marks(token, None)
    if codec.adds_bos:
      return Marks(codec.bos, codec.eos)
    token = codec.bos if codec.eos is None else codec.eos
    if token is None:
      raise ValueError(
        f'{self.tokenizer} names neither BOS nor EOS: give the token between '
        'documents, as in task.separator="<|endoftext|>"'
      )
    return Marks(token, None)

  @property
  def bos(self) -> int:
    return self.marks.begin

  @property
  def vocab_size(self) -> int:
    return self.codec.vocab_size

  @property
  def byte_counts(self) -> np.ndarray:
    return self.codec.byte_counts

  @property
  def chance(self) -> float:
    return _chance(self, self._unscored)

  @property
  def text_digest(self) -> str:
    text = digest_documents(self.path, self.tfds_name, self.tfds_data_dir)
    what = f'{VERSION} {text} {self.codec.digest} {self.marks}'
    return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()

  @property
  def _unscored(self) -> int | None:
    return None if self.marks.end is None else self.bos

  @property
  def stop_tokens(self) -> tuple[int, ...]:
    return tuple({*self.codec.stops, self.bos})

  def text(self, split: str) -> np.ndarray:
    text = load_tokens(self)[split]
    self._check_length(split, text)
    return text

  def weights(self, labels: np.ndarray) -> np.ndarray:
    unscored = self._unscored
    return (labels != (-1 if unscored is None else unscored)).astype(np.float32)

  def encode(self, prompt: str) -> list[int]:
    """Tokens of a prompt, as the tokenizer frames it."""
    return self.codec.encode(prompt)

  def decode(
    self, tokens: Iterable[int], prompt: Sequence[int]
  ) -> Iterator[bytes]:
    parts = self.codec.stream(tokens, after=prompt)
    return (text.encode() for text in parts)


class Marks(NamedTuple):
  """Special tokens around each document; no end where the next one begins."""

  begin: int
  end: int | None


@functools.lru_cache(maxsize=8)
def load_tokenizer(path: str) -> Tokenizer:
  """`Tokenizer.load`, once for the process."""
  return Tokenizer.load(path)


@functools.lru_cache(maxsize=8)
def _chance(task: TextLM, unscored: int | None) -> float:
  return commonest_share(task.text('train'), task.vocab_size, unscored)


@functools.lru_cache(maxsize=8)
def load_tokens(task: TextLM) -> dict[str, np.ndarray]:
  """The tokens of every split, from the cache, where they are put if missing.

  Raises:
    ValueError: the text cannot be read, or is not UTF-8.
    OSError: the cache cannot be written.
  """
  folder = cache_folder() / 'text_lm' / task.text_digest
  dtype = np.uint16 if task.vocab_size <= 2**16 else np.uint32
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = tempfile.mkdtemp(prefix='.incomplete-', dir=folder.parent)
    try:
      _write_tokens(task, pathlib.Path(aside), dtype)
      # Others may read it.
      os.chmod(aside, 0o755)
      with contextlib.suppress(OSError):
        # Unless another process was faster.
        os.rename(aside, folder)
    finally:
      shutil.rmtree(aside, ignore_errors=True)
  return {split: _open(folder / f'{split}.bin', dtype) for split in SPLITS}


def _open(path: pathlib.Path, dtype: type) -> np.ndarray:
  # No file of nothing can be mapped.
  if not path.stat().st_size:
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, mode='r')


def _write_tokens(task: TextLM, folder: pathlib.Path, dtype: type) -> None:
  """Tokenizes all documents into a file per split."""
  parts = (
    part
    for document in read_documents(
      task.path, task.tfds_name, task.tfds_data_dir
    )
    for part in _parts(document)
  )
  begin, end = task.marks
  with contextlib.ExitStack() as stack:
    files = {
      split: stack.enter_context((folder / f'{split}.bin').open('wb'))
      for split in SPLITS
    }
    bar = stack.enter_context(
      tqdm.tqdm(desc='tokenizing', unit='char', unit_scale=True, disable=None)
    )
    for batch in _batches(parts):
      encoded = task.codec.encode_plain([part.text for part in batch])
      for part, ids in zip(batch, encoded, strict=True):
        tokens = [begin] * part.first + ids
        if part.last and end is not None:
          tokens.append(end)
        files[part.split].write(np.array(tokens, dtype).tobytes())
        bar.update(len(part.text))


class _Part(NamedTuple):
  """Part of a document, and whether it is the first one and the last."""

  split: str
  text: str
  first: bool
  last: bool


def _parts(document: Document) -> Iterator[_Part]:
  """Cuts a long document where no common tokenizer would join across.

  That is before a line that begins with a letter and after one that does not
  end with a space; else after any line, or within it.
  """
  split, name, text = document
  start = 0
  while start < len(text):
    chunk = bytes(text[start : start + PART])
    last = start + len(chunk) == len(text)
    if not last:
      ends = [m.end() for m in re.finditer(rb'\S\n(?=\S)', chunk)]
      chunk = chunk[: ends[-1] if ends else chunk.rfind(b'\n') + 1] or chunk
      # Not within a character of UTF-8, which has four bytes at most.
      cuts = range(len(chunk), len(chunk) - 4, -1)
      whole = (cut for cut in cuts if text[start + cut] >> 6 != 2)
      chunk = chunk[: next(whole, None)]
    try:
      yield _Part(split, chunk.decode(), start == 0, last)
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{name} is no text in UTF-8 (byte {chunk[error.start]:#04x} at '
        f'{start + error.start}): convert it, or take bytes_lm'
      ) from error
    start += len(chunk)


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
  """Parts in lists of some megabytes."""
  batch, size = [], 0
  for part in parts:
    batch.append(part)
    size += len(part.text)
    if size >= AT_ONCE:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch
