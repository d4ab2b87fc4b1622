"""Text generation by a trained model: `python -m longctx.generate`."""

import sys

from longctx.cli.generate import main

if __name__ == '__main__':
  main(sys.argv[1:])
