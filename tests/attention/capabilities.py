"""Writes docs/capabilities.md from a run of the conformance suite.

    make capabilities

A cell is yes only because its test ran and passed. A variant's test of what it
lacks is that it refuses, with the reason that the page gives.
"""

import pathlib
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

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


def passed(report: pathlib.Path) -> set[tuple[str, str]]:
  """The cells whose tests passed, from pytest's JUnit report."""
  cells = set()
  for case in ElementTree.parse(report).iter('testcase'):
    cell = case.find('properties/property[@name="cell"]')
    is_pass = not {'failure', 'error', 'skipped'} & {e.tag for e in case}
    if cell is not None and is_pass:
      variant, capability = cell.get('value').split()
      cells.add((variant, capability))
  return cells


def main() -> int:
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / 'report.xml'
    # A process of its own: shapes are checked in what pytest imports first.
    command = [sys.executable, '-m', 'pytest', f'--junit-xml={report}']
    command += ['-m', 'slow or not slow']
    code = subprocess.call([*command, *sys.argv[1:], str(SUITE)])
    found = passed(report) if report.exists() else set()
  # The page itself may be what is not current.
  missing = {(v, c) for v in VARIANTS for c in CAPABILITIES} - found
  if missing:
    print(f'{PAGE} is left as it was; no pass for {sorted(missing)[:8]}')
    return code or 1
  PAGE.parent.mkdir(exist_ok=True)
  PAGE.write_text(render())
  print(f'wrote {PAGE}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
