"""Notebooks kept as py:percent files: parsed, run and written as Markdown.

python -m docs.tools.notebooks docs/notebooks/recall.py

prints the notebook with what its cells print. A cell begins at a line `# %%`;
one that begins at `# %% [markdown]` is text in comments.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import sys

from matplotlib import pyplot as plt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """Notebook cell: Markdown, or code with what it printed and drew.

  Attributes:
    source: Markdown or Python.
    line: of the file, before the first of the source.
    is_code: which of the two.
    printed: standard output of the code.
    figures: PNG files of the figures that the code left open.
  """

  source: str
  is_code: bool
  line: int = 0
  printed: str = ''
  figures: tuple[bytes, ...] = ()


def parse(text: str) -> list[Cell]:
  """The cells of a py:percent file; what stands above the first is left out."""
  cells, line = [], 0
  for part in ('\n' + text).split('\n# %%')[1:]:
    kind, _, body = part.partition('\n')
    is_code = kind.strip() != '[markdown]'
    if not is_code:
      lines = (line.removeprefix('#') for line in body.splitlines())
      body = '\n'.join(line.removeprefix(' ') for line in lines)
    skipped = len(body) - len(body.lstrip())
    begin = line + 1 + body[:skipped].count('\n')
    cells.append(Cell(source=body.strip(), is_code=is_code, line=begin))
    line += part.count('\n') + 1
  return cells


def run(path: pathlib.Path) -> list[Cell]:
  """Runs the code of a notebook, in order and in one namespace."""
  names = {'__name__': '__main__'}
  done = []
  for cell in parse(path.read_text()):
    if cell.is_code:
      printed = io.StringIO()
      with contextlib.redirect_stdout(printed):
        # Blank lines, so that tracebacks name lines of the file.
        source = '\n' * cell.line + cell.source
        exec(compile(source, str(path), 'exec'), names)
      figures = []
      for number in plt.get_fignums():
        png = io.BytesIO()
        plt.figure(number).savefig(png, dpi=100, bbox_inches='tight')
        figures.append(png.getvalue())
      plt.close('all')
      cell = dataclasses.replace(
        cell, printed=printed.getvalue().rstrip(), figures=tuple(figures)
      )
    done.append(cell)
  return done


def to_markdown(cells: list[Cell], stem: str) -> tuple[str, dict[str, bytes]]:
  """The page of a notebook, and its pictures by file name."""
  parts, pictures = [], {}
  for cell in cells:
    if not cell.is_code:
      parts.append(cell.source)
      continue
    parts.append(f'```python\n{cell.source}\n```')
    if cell.printed:
      parts.append(f'```text\n{cell.printed}\n```')
    for png in cell.figures:
      name = f'{stem}-{len(pictures)}.png'
      pictures[name] = png
      parts.append(f'![Figure of the cell above]({name})')
  return '\n\n'.join(parts) + '\n', pictures


def main(argv: list[str]):
  """Prints a notebook; with a folder, writes its page and pictures there."""
  path = pathlib.Path(argv[1])
  page, pictures = to_markdown(run(path), path.stem)
  if len(argv) == 2:
    print(page, end='')
    return
  folder = pathlib.Path(argv[2])
  folder.mkdir(parents=True, exist_ok=True)
  for name, png in pictures.items():
    (folder / name).write_bytes(png)
  (folder / f'{path.stem}.md').write_text(page)


if __name__ == '__main__':
  os.environ.setdefault('MPLBACKEND', 'Agg')
  main(sys.argv)
