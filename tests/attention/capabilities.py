"""Writes docs/capabilities.md from a run of the conformance suite.

    make capabilities

A cell is yes only because its test ran and passed. A variant's test of what it
lacks is that it refuses, with the reason that the page gives.
"""

import pathlib
import sys

import pytest

from longctx.attention import VARIANTS
from longctx.attention.capabilities import CAPABILITIES

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'capabilities.md'
SUITE = pathlib.Path(__file__).with_name('test_conformance.py')

HEADER = """# What each variant can do

`make capabilities` writes this page from the results of
`tests/attention/test_conformance.py`. A ✓ is a test that passed. A number is a
combination that is refused when the config is read, with the reason below.

"""


def render(variants=VARIANTS) -> str:
  """The page for variants whose tests all pass."""
  reasons = {}
  rows = []
  for name, variant in sorted(variants.items()):
    cells = []
    for capability in CAPABILITIES:
      reason = variant.unsupported.get(capability)
      if reason is None:
        cells.append('✓')
      else:
        cells.append(str(reasons.setdefault(reason, len(reasons) + 1)))
    rows.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
  titles = [capability.replace('_', ' ') for capability in CAPABILITIES]
  lines = [
    '| variant | ' + ' | '.join(titles) + ' |',
    '|---|' + ':-:|' * len(titles),
    *rows,
    '',
    '## Why not',
    '',
    *(f'{number}. {reason}' for reason, number in reasons.items()),
    '',
    '## What is asked',
    '',
    *(
      f'- **{capability.replace("_", " ")}**: {meaning}'
      for capability, meaning in CAPABILITIES.items()
    ),
  ]
  return HEADER + '\n'.join(lines) + '\n'


class Recorder:
  """Notes which cells passed."""

  def __init__(self):
    self.passed = set()

  def pytest_runtest_logreport(self, report):
    cell = dict(report.user_properties).get('cell')
    if report.when == 'call' and cell is not None and report.passed:
      self.passed.add(tuple(cell))


def main() -> int:
  recorder = Recorder()
  arguments = ['-q', *sys.argv[1:], str(SUITE)]
  code = pytest.main(arguments, plugins=[recorder])
  cells = {(v, c) for v in VARIANTS for c in CAPABILITIES}
  if code or cells - recorder.passed:
    missing = sorted(cells - recorder.passed)
    print(f'{PAGE} is left as it was; cells without a pass: {missing[:8]}')
    return 1
  PAGE.parent.mkdir(exist_ok=True)
  PAGE.write_text(render())
  print(f'wrote {PAGE}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
