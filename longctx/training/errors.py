"""Exceptions of training runs that a command line reports in one line."""


class CheckpointError(RuntimeError):
  """A checkpoint cannot be used; the message is one line for the user."""


class DamagedFileError(ValueError):
  """A file of a workdir is not what was written."""


class WriteError(Exception):
  """A file cannot be written; the message names it, and what is safe."""


class LockedError(Exception):
  """Another process trains in this workdir."""


class StoppedError(Exception):
  """The run was asked to stop by a signal, and saved itself."""

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.signum = signum


class NotFiniteError(Exception):
  """A loss, gradient or parameter is NaN or infinite."""
