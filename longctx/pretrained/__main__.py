"""Pretrained models: `python -m longctx.pretrained fetch | import | export`."""

import importlib
import sys

if __name__ == '__main__':
  # By its name, as no room below the command lines imports them.
  longctx = importlib.import_module('longctx.__main__')
  sys.exit(longctx.main(['pretrained', *sys.argv[1:]]))
