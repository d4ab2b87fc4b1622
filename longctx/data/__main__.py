"""Prepared datasets: `python -m longctx.data prepare`."""

import sys

from longctx.cli.prepare import main

if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
