"""Exceptions of training runs that a command line reports in one line."""


class CheckpointError(RuntimeError):
  """A checkpoint cannot be used; the message is one line for the user."""


class StoppedError(Exception):
  """The run was asked to stop by a signal, and saved itself."""

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.signum = signum


class NotFiniteError(Exception):
  """A loss, gradient or parameter is NaN or infinite."""
