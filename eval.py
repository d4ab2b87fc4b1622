"""Evaluation from the command line; `python eval.py --help` says how."""

import sys

from longctx.__main__ import main

if __name__ == '__main__':
  sys.exit(main(['eval', *sys.argv[1:]]))
