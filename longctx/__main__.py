"""Command lines of longctx: `python -m longctx` lists them."""

import importlib
import sys


def main(argv: list[str]) -> int:
  """Runs the command that is named, or lists them."""
  # By its name, as no room below the command lines imports them.
  return importlib.import_module('longctx.cli.flags').main(argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
