"""Plan of a config on a pod: `python -m longctx.plan`."""

import sys

from longctx.cli.plan import main

if __name__ == '__main__':
  main(sys.argv)
