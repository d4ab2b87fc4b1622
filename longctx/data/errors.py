"""Exceptions of data that a command line reports in one line."""


class DamagedDataError(ValueError):
  """Prepared examples cannot be read; the message is one line for the user."""
