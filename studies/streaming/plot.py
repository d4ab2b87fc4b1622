"""Loss along the short stream, under each policy."""

import pathlib

from longctx.training import figures
from studies.claims import markdown, ranged
from studies.streaming.measure import POLICIES

TITLE = 'Bytes of Python, 256 tokens; 4 layers of full attention, width 128'
TRAINED_AT = 256


def show(rows, folder: pathlib.Path):
  """Writes streams.png and table.md."""
  curves = {name: [row['curves'][name] for row in rows] for name in POLICIES}
  path = folder / 'streams.png'
  figures.stream(path, curves, trained_at=TRAINED_AT, title=TITLE)
  (folder / 'table.md').write_text(table(rows))


def table(rows) -> str:
  """Markdown: the policies, median and range over the seeds."""
  cells = []
  for name in POLICIES:
    over = ranged(row[name] - row['recompute'] for row in rows)
    cells.append([f'`{name}`', ranged(row[name] for row in rows), over])
  return markdown(('policy', 'nats per byte', 'above `recompute`'), cells)
