"""Metrics log of a run: metrics.jsonl and, if asked, TensorBoard."""

import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from longctx.training.log_files import JsonLog, seal
from longctx.training.metrics import is_writer, say

KEYS = ('step', 'split')


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl that can be read; of others it is said."""
  log = JsonLog(workdir / 'metrics.jsonl', keys=KEYS, strict=None)
  return log.rows()


class MetricsLog:
  """Metrics log, which appends to metrics.jsonl and TensorBoard."""

  # The state of a log without lines.
  EMPTY: ClassVar = {'lines': 0, 'crc': 0}

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    start_step: int,
    tensorboard: bool,
    saved: Mapping[str, int] | None = None,
  ):
    """Opens the log of a run that continues after `start_step`.

    Lines of later steps are dropped: the run makes those steps again.

    Args:
      workdir: of the run.
      start_step: updates made so far.
      tensorboard: whether to write its events too.
      saved: `state` when that step was saved; None: of a new run, or one of
        earlier versions, whose lines have no CRC.
    """
    path = workdir / 'metrics.jsonl'
    self._log = JsonLog(path, keys=KEYS, strict=saved is not None)
    if again := self._log.remove(lambda row: row['step'] > start_step):
      say(f'{path}: {again} lines of steps after {start_step} are made again')
    self._log.seal_lines()
    self._lines = self._crc = 0
    self.rows()
    lines = self._log.lines()
    for line in lines:
      if line.row is not None:
        self._count(line.text)
    # Of lines that cannot be read it has been said.
    explained = self._lines < len(lines) == (saved or {}).get('lines')
    if saved and self.state() != saved and not explained:
      say(
        f'{path}: {self._lines} lines up to step {start_step} can be read, and '
        f'checkpoint {start_step} was written after {saved["lines"]}: some are '
        'missing, or others than they were'
      )
    self._board = None
    if tensorboard and is_writer():
      self._board = make_summary_writer()(
        str(workdir / 'tensorboard'), purge_step=start_step + 1
      )

  def rows(self) -> list[dict[str, Any]]:
    """All lines so far."""
    return self._log.rows()

  def state(self) -> dict[str, int]:
    """How many lines there are, and a sum of them."""
    return {'lines': self._lines, 'crc': self._crc}

  def _count(self, text: bytes):
    self._lines += 1
    self._crc = zlib.crc32(text, self._crc)

  def write(self, row: dict[str, Any]):
    """Appends one object with `step`, `split`, numbers and lists of them."""
    self._log.append(row)
    self._count(seal(row))
    if self._board is not None:
      for key, value in row.items():
        if key not in KEYS:
          for tag, scalar in _scalars(f'{row["split"]}/{key}', value):
            self._board.add_scalar(tag, scalar, row['step'])

  def close(self):
    if self._board is not None:
      self._board.close()


def _scalars(tag: str, value: Any) -> Iterator[tuple[str, float]]:
  """The numbers of a value by tag: of a list by place, of a dict by key."""
  if isinstance(value, int | float):
    yield tag, value
  elif isinstance(value, list):
    for index, item in enumerate(value):
      yield from _scalars(f'{tag}/{index}', item)
  elif isinstance(value, dict):
    for key, item in value.items():
      yield from _scalars(f'{tag}/{key}', item)


def make_summary_writer() -> Callable[..., Any]:
  """TensorBoard's writer, from the optional dependency.

  Raises:
    ValueError: it is not installed.
  """
  try:
    import tensorboardX
  except ImportError as error:
    raise ValueError(
      "log.tensorboard=True needs tensorboardX: pip install -e '.[tensorboard]'"
    ) from error
  return tensorboardX.SummaryWriter
