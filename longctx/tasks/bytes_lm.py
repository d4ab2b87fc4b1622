"""Language modelling of real text, byte by byte."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import sysconfig

import numpy as np
import tensorflow_datasets as tfds

from longctx.tasks.checks import Positive
from longctx.tasks.task import (
  NUM_BUCKETS,
  SPLITS,
  Example,
  Task,
  check_address,
  split_of,
)

BOS = 256

# Tokens of a piece, and the most pieces, that the digest of a text looks at.
PIECE, PIECES = 2**16, 4096

# Not the standard library itself, or not shipped by every distribution of it.
NOT_STDLIB = {
  '__pycache__',
  'dist-packages',
  'idlelib',
  'lib2to3',
  'site-packages',
  'test',
  'tests',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesLM(Task):
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

  Attributes:
    path: a file or folder of any content; empty: the standard library.
    tfds_name: a TFDS dataset to read in place of `path`, as 'name' or
      'name/config'.
    tfds_data_dir: where TFDS keeps its datasets; empty: its default.
    packed: give segment_ids, so that no document sees another.
    prepend_bos: begin every window with BOS instead of its first byte's
      predecessor, as an anchor that is always there.
  """

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
    for split in SPLITS:
      text = self.text(split)
      if len(text) < self.seq_len + 1:
        raise ValueError(
          f'the {split} split of {self._origin()} has {len(text)} bytes, '
          f'fewer than seq_len + 1 = {self.seq_len + 1}: give a shorter '
          'seq_len, more text, or a single file, which is split by regions'
        )

  @property
  def vocab_size(self) -> int:
    return 257

  @property
  def chance(self) -> float:
    return commonest_share(self.path, self.tfds_name, self.tfds_data_dir)

  @property
  def text_digest(self) -> str:
    return digest_text(self.path, self.tfds_name, self.tfds_data_dir)

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
      stream[0] = BOS
    tokens, labels = stream[:-1], stream[1:]
    segment_ids = None
    if self.packed:
      segment_ids = 1 + np.cumsum(tokens == BOS, dtype=np.int32)
      # A window that begins with BOS begins with document 1 all the same.
      segment_ids -= segment_ids[0] - 1
    return Example(
      tokens=tokens,
      labels=labels,
      weights=self.weights(labels),
      segment_ids=segment_ids,
    )

  @property
  def has_bos(self) -> bool:
    """Whether a window may begin with BOS, which a single file has not."""
    return self.prepend_bos or bool(self.text('train')[0] == BOS)

  def text(self, split: str) -> np.ndarray:
    """All tokens of a split, BOS before each document."""
    return load_text(self.path, self.tfds_name, self.tfds_data_dir)[split]

  def weights(self, labels: np.ndarray) -> np.ndarray:
    """Where a document begins nothing is predicted."""
    return (labels != BOS).astype(np.float32)

  def _origin(self) -> str:
    return self.tfds_name or self.path or str(stdlib_folder())


@functools.lru_cache(maxsize=8)
def load_text(
  path: str, tfds_name: str, tfds_data_dir: str
) -> dict[str, np.ndarray]:
  """The text of every split as one array of tokens, kept for the process."""
  if tfds_name:
    return join_documents(read_tfds(tfds_name, tfds_data_dir))
  root = pathlib.Path(path).expanduser() if path else stdlib_folder()
  try:
    if root.is_dir():
      return join_documents(read_folder(root, is_stdlib=not path))
    return split_file(root)
  except OSError as error:
    raise ValueError(
      f'cannot read text from {error.filename or root}: {error.strerror}'
    ) from error


@functools.lru_cache(maxsize=8)
def commonest_share(path: str, tfds_name: str, tfds_data_dir: str) -> float:
  """Share of the commonest byte among the bytes of the training split."""
  counts = np.zeros(257, np.int64)
  text = load_text(path, tfds_name, tfds_data_dir)['train']
  # In pieces, because bincount makes int64 of what may be a file on disk.
  for start in range(0, len(text), 2**24):
    counts += np.bincount(text[start : start + 2**24], minlength=257)
  return float(counts[:BOS].max() / counts[:BOS].sum())


@functools.lru_cache(maxsize=8)
def digest_text(path: str, tfds_name: str, tfds_data_dir: str) -> str:
  """Digest of the text: of its lengths and all of it, or of 4,096 pieces."""
  digest = hashlib.blake2b(digest_size=8)
  for split, text in load_text(path, tfds_name, tfds_data_dir).items():
    digest.update(f'{split} {len(text)} '.encode())
    starts = np.arange(0, len(text), PIECE)
    if len(starts) > PIECES:
      # A file of a terabyte is not read whole at each start.
      starts = np.linspace(0, len(text) - PIECE, PIECES).astype(np.int64)
    for start in starts:
      digest.update(np.ascontiguousarray(text[start : start + PIECE]))
  return digest.hexdigest()


def stdlib_folder() -> pathlib.Path:
  """Where the running interpreter's standard library lies."""
  return pathlib.Path(sysconfig.get_paths()['stdlib'])


def read_folder(root: pathlib.Path, *, is_stdlib: bool):
  """Yields (split, bytes) of every file below a folder, in a fixed order."""
  skipped = NOT_STDLIB if is_stdlib else set()
  names = []
  for folder, subfolders, files in os.walk(root, onerror=_raise):
    subfolders[:] = [
      s for s in subfolders if s not in skipped and not s.startswith('.')
    ]
    relative = pathlib.Path(folder).relative_to(root)
    names += [(relative / f).as_posix() for f in files if not f.startswith('.')]
  if is_stdlib:
    # The build's own settings, `_sysconfigdata*`, differ on every machine.
    names = [n for n in names if n.endswith('.py') and '_sysconfig' not in n]
  for name in sorted(names):
    if (root / name).is_file():
      yield split_of(name.encode()), (root / name).read_bytes()


def split_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Cuts one file into contiguous regions, read from disk when used."""
  if not path.stat().st_size:
    raise ValueError(f'the text file {path} is empty')
  text = np.memmap(path, np.uint8, mode='r')
  held_out = len(text) // NUM_BUCKETS
  cuts = (len(text) - 2 * held_out, len(text) - held_out)
  return dict(zip(SPLITS, np.split(text, cuts), strict=True))


def read_tfds(name: str, data_dir: str):
  """Yields (split, bytes) of every document of a TFDS dataset."""
  try:
    source = tfds.data_source(name, data_dir=data_dir or None, split='all')
    features = source.dataset_info.features
  except Exception as error:
    # TFDS has no common error class, and its messages list every dataset.
    raise ValueError(
      f'cannot read the TFDS dataset {name!r} from '
      f'{data_dir or "the default folder"}: {str(error).splitlines()[0][:200]}'
    ) from error
  texts = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
  if 'text' not in texts and len(texts) != 1:
    raise ValueError(
      f'the TFDS dataset {name!r} has features {", ".join(features)}: one must '
      "be a text, or the text must be called 'text'"
    )
  key = 'text' if 'text' in texts else texts[0]
  for record in source:
    text = record[key]
    text = text.encode() if isinstance(text, str) else text
    yield split_of(text), text


def join_documents(documents) -> dict[str, np.ndarray]:
  """Joins (split, bytes) into one array of tokens per split, BOS before each.

  Empty documents and repeated ones are left out.
  """
  parts = {split: [np.zeros(0, np.uint16)] for split in SPLITS}
  seen = set()
  for split, text in documents:
    digest = hashlib.blake2b(text, digest_size=16).digest()
    if text and digest not in seen:
      seen.add(digest)
      tokens = np.full(len(text) + 1, BOS, np.uint16)
      tokens[1:] = np.frombuffer(text, np.uint8)
      parts[split].append(tokens)
  return {split: np.concatenate(arrays) for split, arrays in parts.items()}


def _raise(error: OSError) -> None:
  """os.walk leaves out what it cannot list, unless told otherwise."""
  raise error
