"""Writes REPORT.md: every claim of every study, from their results.json.

python -m studies.report
"""

import json
import pathlib

from studies.claims import failed, table
from studies.jobs import ROOT

HEAD = """# What the studies found

Made by `python -m studies.report` from `studies/*/results.json`; a figure is
the median over seeds, its range beside it, and a claim is ok where the median
meets its bar. `python -m studies.all` repeats all of it, `--quick` at reduced
size.
"""


def report(root: pathlib.Path = ROOT) -> str:
  """The text of REPORT.md.

  Args:
    root: the folder in which studies/ lies.
  """
  paths = sorted(root.glob('studies/*/results.json'))
  found = {path.parent.name: json.loads(path.read_text()) for path in paths}
  counts = [
    '| study | claims that hold | seeds | figures |',
    '|---|---|---|---|',
  ]
  sections = []
  for name, claims in found.items():
    folder = f'studies/{name}'
    pictures = sorted(p.name for p in (root / folder).glob('*.png'))
    links = ', '.join(f'[{p}]({folder}/{p})' for p in pictures)
    holding = len(claims) - len(failed(claims))
    seeds = sorted({len(claim['seeds']) for claim in claims})
    counts.append(
      f'| [{name}]({folder}/README.md) | {holding} of {len(claims)} | '
      f'{", ".join(map(str, seeds))} | {links} |'
    )
    sections.append(_section(name, claims, pictures))
  return '\n'.join([HEAD, *counts, '', *sections])


def _section(name: str, claims: list[dict], pictures: list[str]) -> str:
  lines = [f'## {name}\n', table(claims)]
  # A study may be assembled from runs of several commits.
  for key in ('command', 'commit', 'hardware'):
    values = list(dict.fromkeys(str(claim[key]) for claim in claims))
    quoted = ', '.join(f'`{v}`' if key == 'command' else v for v in values)
    lines.append(f'{key.capitalize()}: {quoted}.  ')
  lines += [f'\n![{p}](studies/{name}/{p})' for p in pictures]
  return '\n'.join(lines) + '\n'


def main():
  path = ROOT / 'REPORT.md'
  path.write_text(report())
  print(f'{path} written')


if __name__ == '__main__':
  main()
