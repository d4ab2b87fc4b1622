"""Workdir lock: one training at a time.

The lock is the kernel's (`flock` on the file `lock`), which a dead process no
longer holds; the file says who has it.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from longctx.training.errors import LockedError
from longctx.training.log_files import writing
from longctx.training.metrics import is_writer, say


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a workdir; of several processes the first one does.

  Raises:
    LockedError: another process trains there.
    WriteError: the lock cannot be written.
  """
  if not is_writer():
    yield
    return
  path = workdir / 'lock'
  with writing(path):
    workdir.mkdir(parents=True, exist_ok=True)
    file = path.open('a+')
  with file:
    _take(file, path)
    try:
      yield
    finally:
      # Left empty and not deleted: another may just be opening it.
      file.truncate(0)


def _take(file, path: pathlib.Path):
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    holder = file.read().strip() or 'another process'
    raise LockedError(
      f'{path.parent} is trained by {holder}: wait for its end, or give '
      'another --workdir'
    ) from None
  except OSError as error:
    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
      raise
    say(f'{path}: this file system has no locks; train here once at a time')
  with writing(path):
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
