"""Analysis of a trained model: `python -m longctx.analysis`."""

import sys

from longctx.cli.analyze import main

if __name__ == '__main__':
  main(sys.argv[1:])
