"""Documents of text: of a folder, a file, a TFDS dataset or Python itself."""

import functools
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Shaped

from longctx.tasks.task import NUM_BUCKETS, SPLITS, split_of

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


class Document(NamedTuple):
  """Document of a split; its name is for messages."""

  split: str
  name: str
  text: bytes | Shaped[np.ndarray, ' bytes']


def read_documents(
  path: str, tfds_name: str, tfds_data_dir: str
) -> Iterator[Document]:
  """Yields the documents of a text, in a fixed order, each of them once.

  Empty documents and repeated ones are left out.

  Args:
    path: a folder, or a file, whose regions are documents that begin with a
      whole character of UTF-8; empty: the standard library.
    tfds_name: a TFDS dataset, in place of `path`.
    tfds_data_dir: where TFDS keeps its datasets; empty: its default.

  Raises:
    ValueError: the text cannot be read.
  """
  if file := single_file(path, tfds_name):
    regions = split_file(file, characters=True)
    for split, text in regions.items():
      yield Document(split, f'the {split} region of {file}', text)
    return
  if tfds_name:
    documents = _read_tfds(tfds_name, tfds_data_dir)
  else:
    root = pathlib.Path(path).expanduser() if path else stdlib_folder()
    documents = _read_folder(root, is_stdlib=not path)
  seen = set()
  for document in documents:
    digest = hashlib.blake2b(document.text, digest_size=16).digest()
    if document.text and digest not in seen:
      seen.add(digest)
      yield document


@functools.lru_cache(maxsize=8)
def digest_documents(path: str, tfds_name: str, tfds_data_dir: str) -> str:
  """Digest of the documents: of their lengths and all or pieces of each."""
  digest = hashlib.blake2b(digest_size=8)
  for split, _, text in read_documents(path, tfds_name, tfds_data_dir):
    digest.update(f'{split} {len(text)} '.encode())
    add_pieces(digest, np.frombuffer(text, np.uint8))
  return digest.hexdigest()


def add_pieces(digest, text: Shaped[np.ndarray, ' T']) -> None:
  """Adds all of a text to a digest, or 4,096 pieces of a long one."""
  starts = np.arange(0, len(text), PIECE)
  if len(starts) > PIECES:
    # A file of a terabyte is not read whole at each start.
    starts = np.linspace(0, len(text) - PIECE, PIECES).astype(np.int64)
  for start in starts:
    digest.update(np.ascontiguousarray(text[start : start + PIECE]))


def cache_folder() -> pathlib.Path:
  """What can be made again is kept here: $LONGCTX_CACHE or ~/.cache/longctx."""
  given = os.environ.get('LONGCTX_CACHE') or '~/.cache/longctx'
  return pathlib.Path(given).expanduser()


def stdlib_folder() -> pathlib.Path:
  """Where the running interpreter's standard library lies."""
  return pathlib.Path(sysconfig.get_paths()['stdlib'])


def single_file(path: str, tfds_name: str) -> pathlib.Path | None:
  """The file that is all of the text, if it is one file."""
  root = pathlib.Path(path).expanduser()
  return root if path and not tfds_name and not root.is_dir() else None


def split_file(
  path: pathlib.Path, *, characters: bool = False
) -> dict[str, np.ndarray]:
  """Cuts one file into contiguous regions, read from disk when used.

  Args:
    path: of the file.
    characters: cut between characters of UTF-8.

  Raises:
    ValueError: it is empty or cannot be read.
  """
  try:
    if not path.stat().st_size:
      raise ValueError(f'the text file {path} is empty')
    text = np.memmap(path, np.uint8, mode='r')
  except OSError as error:
    raise _unreadable(error, path) from error
  held_out = len(text) // NUM_BUCKETS
  cuts = [len(text) - 2 * held_out, len(text) - held_out]
  if characters:
    # Bytes within a character are 10xxxxxx.
    cuts = [c + int(np.argmax(text[c : c + 4] >> 6 != 2)) for c in cuts]
  return dict(zip(SPLITS, np.split(text, cuts), strict=True))


def _read_folder(root: pathlib.Path, *, is_stdlib: bool) -> Iterator[Document]:
  """Yields every file below a folder."""
  skipped = NOT_STDLIB if is_stdlib else set()
  names = []
  try:
    for folder, subfolders, files in os.walk(root, onerror=_raise):
      subfolders[:] = [
        s for s in subfolders if s not in skipped and not s.startswith('.')
      ]
      relative = pathlib.Path(folder).relative_to(root)
      shown = (f for f in files if not f.startswith('.'))
      names += [(relative / f).as_posix() for f in shown]
    if is_stdlib:
      # The build's own settings, `_sysconfigdata*`, differ on every machine.
      names = [n for n in names if n.endswith('.py') and '_sysconfig' not in n]
    for name in sorted(names):
      if (path := root / name).is_file():
        yield Document(split_of(name.encode()), str(path), path.read_bytes())
  except OSError as error:
    raise _unreadable(error, root) from error


def _read_tfds(name: str, data_dir: str) -> Iterator[Document]:
  """Yields every document of a TFDS dataset."""
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
  for index, record in enumerate(source):
    text = record[key]
    text = text.encode() if isinstance(text, str) else text
    yield Document(split_of(text), f'document {index} of {name}', text)


def _unreadable(error: OSError, root: pathlib.Path) -> ValueError:
  return ValueError(
    f'cannot read text from {error.filename or root}: {error.strerror}'
  )


def _raise(error: OSError) -> None:
  """os.walk leaves out what it cannot list, unless told otherwise."""
  raise error
