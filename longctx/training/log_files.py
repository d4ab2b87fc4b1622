"""Log files: JSON lines that are only appended to, and files written whole.

Each line of a log ends with the CRC-32 of the rest, so that damage shows:

    {"step": 50, "split": "train", "loss": 1.25, "crc": "5f3a90c1"}

A last line cut short, by a kill or a full disk, is dropped. Any other line that
cannot be read is reported and stays in the file as it is, and nothing is taken
out of a log but what is measured again, or kept beside it in NAME.old.

JSON files are written whole or not at all. Those that a later command relies
on have a line in SHA256SUMS, as `sha256sum -c` reads it.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from longctx.training.errors import DamagedFileError, WriteError
from longctx.training.metrics import is_writer, say

SUMS = 'SHA256SUMS'
CRC = re.compile(rb'(\{.*), "crc": "([0-9a-f]{8})"\}')

Row = dict[str, Any]


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Names the file in the error of a disk that takes no more of it."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or str(error)
    raise WriteError(f'{path} cannot be written: {reason}') from error


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]):
  """Writes a file whole or not at all.

  Args:
    path: of the file.
    write: called with another path, which then takes its place.

  Raises:
    WriteError: the disk is full, or refuses.
  """
  if not is_writer():
    return
  partial = path.with_name(f'{path.stem}.partial{path.suffix}')
  with writing(path):
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      write(partial)
      os.replace(partial, path)
    except OSError:
      partial.unlink(missing_ok=True)
      raise


def write_text(path: pathlib.Path, text: str):
  """Writes a text file whole or not at all, unless that is what it holds."""
  content = text.encode()
  with contextlib.suppress(OSError):
    if path.read_bytes() == content:
      return
  write_whole(path, lambda partial: partial.write_bytes(content))


def write_json(path: pathlib.Path, value: Any, *, sealed: bool = False):
  """Writes a JSON file; `sealed` notes its sum, which `read_json` compares."""
  text = json.dumps(value, indent=2) + '\n'
  write_text(path, text)
  if sealed:
    sums = _sums(path.parent) | {path.name: _sha256(text.encode())}
    lines = ''.join(f'{sums[name]}  {name}\n' for name in sorted(sums))
    write_text(path.parent / SUMS, lines)


def read_json(path: pathlib.Path) -> Any:
  """The value of a JSON file.

  Raises:
    DamagedFileError: it is no JSON, or not what was written.
    OSError: it cannot be read.
  """
  content = path.read_bytes()
  try:
    value = json.loads(content.decode())
  except (ValueError, RecursionError) as error:
    reason = f'{error}'.splitlines()[0]
    raise DamagedFileError(f'{path} is damaged ({reason})') from error
  if _sums(path.parent).get(path.name, '') not in ('', _sha256(content)):
    raise DamagedFileError(
      f'{path} is not what was written: its sum in {SUMS} is another'
    )
  return value


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _sums(folder: pathlib.Path) -> dict[str, str]:
  path = folder / SUMS
  if not path.exists():
    return {}
  lines = path.read_text(errors='replace').splitlines()
  pairs = (line.split('  ', 1) for line in lines if '  ' in line)
  return {name: value for value, name in pairs}


class Line(NamedTuple):
  """Line of a log: its bytes, and the object in them; None where damaged."""

  text: bytes
  row: Row | None


class JsonLog:
  """JSON lines log, appended to by one process."""

  def __init__(
    self,
    path: pathlib.Path,
    *,
    keys: tuple[str, ...] = (),
    strict: bool | None = True,
  ):
    """Opens it.

    Args:
      path: of the file, which need not exist.
      keys: that each line has.
      strict: whether a line without a CRC counts as damaged; None: where
        another one has it.
    """
    self.path = path
    self._old = path.with_name(f'{path.name}.old')
    self._keys, self._strict = keys, strict

  def lines(self) -> list[Line]:
    """All lines but a last one that was cut short."""
    if not self.path.exists():
      return []
    *whole, last = self.path.read_bytes().split(b'\n')
    if self._strict is None:
      self._strict = any(map(CRC.fullmatch, whole))
    found = [Line(text, self._parse(text)) for text in whole]
    # What was whole but for its end.
    last = last[: last.rfind(b'}') + 1]
    row = self._parse(last)
    return found if row is None else [*found, Line(last, row)]

  def _parse(self, text: bytes) -> Row | None:
    if match := CRC.fullmatch(text):
      text = match[1] + b'}'
      if zlib.crc32(text) != int(match[2], 16):
        return None
    elif self._strict:
      return None
    try:
      row = json.loads(text.decode())
    except (ValueError, RecursionError):
      return None
    good = isinstance(row, dict) and row.keys() >= set(self._keys)
    return row if good else None

  def rows(self) -> list[Row]:
    """The objects that can be read; of others it is said which they are."""
    lines = self.lines()
    bad = [n for n, line in enumerate(lines, 1) if line.row is None]
    if bad:
      shown = ', '.join(map(str, bad[:5])) + ', ...' * (len(bad) > 5)
      _say_once(
        f'{self.path}: line {shown} is damaged, or of an earlier version: it '
        'stays in the file, and is left out'
      )
    return [line.row for line in lines if line.row is not None]

  def append(self, *rows: Row):
    """Adds lines, each whole or not at all."""
    if not is_writer():
      return
    self._mend_end()
    with writing(self.path), self.path.open('ab', buffering=0) as file:
      for row in rows:
        end = file.seek(0, os.SEEK_END)
        text = seal(row) + b'\n'
        try:
          # The end of a disk may take a part of it without an error.
          while text:
            text = text[file.write(text) :]
        except OSError:
          file.truncate(end)
          raise

  def remove(self, unwanted: Callable[[Row], bool], *, keep: bool = False):
    """Takes out lines, which `keep` moves to NAME.old.

    Returns:
      How many there were.
    """
    self._mend_end()
    out, kept = [], []
    for line in self.lines():
      goes = line.row is not None and unwanted(line.row)
      (out if goes else kept).append(line)
    if out and keep:
      JsonLog(self._old).append(*(line.row for line in out))
    if out:
      self._rewrite(line.text for line in kept)
    return len(out)

  def seal_lines(self):
    """Gives a CRC to lines of earlier versions; the file stays as NAME.old."""
    lines = self.lines()
    sealed = [x.text if x.row is None else seal(x.row) for x in lines]
    if sealed != [x.text for x in lines]:
      content = self.path.read_bytes()
      write_whole(self._old, lambda partial: partial.write_bytes(content))
      self._rewrite(sealed)
    self._strict = True

  def _rewrite(self, texts: Iterable[bytes]):
    content = b''.join(text + b'\n' for text in texts)
    write_whole(self.path, lambda partial: partial.write_bytes(content))

  def _mend_end(self):
    """Drops a last line that was cut short, before another is added."""
    if is_writer() and self.path.exists() and self.path.stat().st_size:
      with self.path.open('rb') as file:
        file.seek(-1, os.SEEK_END)
        whole = file.read() == b'\n'
      if not whole:
        self._rewrite(line.text for line in self.lines())


def seal(row: Row) -> bytes:
  """The line of an object, without its end."""
  body = json.dumps(row).encode()
  return body[:-1] + f', "crc": "{zlib.crc32(body):08x}"}}'.encode()


@functools.cache
def _say_once(message: str):
  say(message)


def read_lines(path: pathlib.Path) -> list[Row]:
  """The objects of a JSON-lines file, with CRCs or without."""
  return JsonLog(path, strict=None).rows()


def write_lines(path: pathlib.Path, rows: Iterable[Row]):
  """Writes a JSON-lines file without CRCs."""
  write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))
