"""Figures and tables of studies, drawn again from their committed results.

python -m studies.plot                    # all of them
python -m studies.plot retrieval copying
"""

import sys

from longctx.training import log_files
from studies.all import load, names


def main(chosen: list[str]):
  for name in chosen or names():
    study = load(name)
    lines = study.folder / 'results.jsonl'
    rows = log_files.read_lines(lines) if lines.exists() else []
    study.show(rows, study.folder)
    print(f'{study.folder} drawn')


if __name__ == '__main__':
  main(sys.argv[1:])
