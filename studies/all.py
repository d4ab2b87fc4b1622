"""Runs every study, checks its claims and writes REPORT.md.

    python -m studies.all --quick
    python -m studies.all --only=retrieval,copying --processes=2

With --quick each study runs at reduced size from one seed into runs/quick, and
REPORT.md stays as it is. Ends with exit code 1, and a table of what failed,
where a claim that counts does not hold.
"""

import argparse
import importlib
import sys

from studies import report
from studies.claims import failed, table
from studies.common import ROOT, main


def names() -> list[str]:
  """The folders that hold a study."""
  return sorted(p.parent.name for p in (ROOT / 'studies').glob('*/run.py'))


def load(name: str):
  """The `Study` of a folder."""
  return importlib.import_module(f'studies.{name}.run').STUDY


def run(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m studies.all',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--quick', action='store_true', help='reduced size')
  parser.add_argument('--processes', type=int, default=1, help='at a time')
  parser.add_argument('--only', default='', help='names, by commas')
  args = parser.parse_args(argv)
  options = ['--quick'] * args.quick + [f'--processes={args.processes}']
  wrong = []
  for name in args.only.split(',') if args.only else names():
    print(f'\n{name}', flush=True)
    wrong += failed(main(load(name), options))
  if not args.quick:
    report.main()
  if wrong:
    print(f'\nThese claims do not hold:\n\n{table(wrong)}', file=sys.stderr)
  return bool(wrong)


if __name__ == '__main__':
  sys.exit(run())
