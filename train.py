"""Training from the command line; `python train.py --help` says how."""

import sys

from longctx.__main__ import main

if __name__ == '__main__':
  sys.exit(main(['train', *sys.argv[1:]]))
