"""Plan of a config on a pod: `python -m longctx.plan`."""

import importlib
import sys

if __name__ == '__main__':
  # By its name, as no room below the command lines imports them.
  longctx = importlib.import_module('longctx.__main__')
  sys.exit(longctx.main(['plan', *sys.argv[1:]]))
