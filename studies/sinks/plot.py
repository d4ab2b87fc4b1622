"""Attention sinks: who leans on BOS, and what it costs to lose it."""

import pathlib

from longctx.training import figures
from studies.claims import markdown, ranged
from studies.common import by_run

TITLE = (
  'Bigrams with triggers that copy, 64 tokens; one layer of width 64, one '
  'head, learned positions'
)
KEYS = {
  'sink rate': 'sink_rate',
  'at rest': 'dormant',
  'at triggers': 'active',
  'loss': 'loss',
  'without BOS': 'evicted_loss',
}


def show(rows, folder: pathlib.Path):
  """Writes sinks.png and table.md."""
  runs = by_run(rows)
  figure, (bars, points) = figures.axes(2, title=TITLE)
  for index, label in enumerate(('at rest', 'at triggers')):
    seeds = [[row[KEYS[label]] for row in found] for found in runs.values()]
    figures.bars(bars, seeds, label=label, index=index)
  bars.set_xticks(range(len(runs)), runs, rotation=30, ha='right')
  bars.set_ylabel('attention to BOS')
  figures.name_range(bars, 'range over seeds', bars=True)
  for name, style in figures.styles(runs).items():
    mass = [row['first_token'] for row in runs[name]]
    lost = [row['evicted_loss'] - row['loss'] for row in runs[name]]
    points.plot(mass, lost, **{**style, 'ls': '', 'ms': 7}, label=name)
  points.set_xlabel('attention to BOS')
  points.set_ylabel('nats per token lost with BOS')
  figures.legend_below(figure)
  figures.save(figure, folder / 'sinks.png')
  (folder / 'table.md').write_text(table(runs))


def table(runs) -> str:
  """Markdown: medians and ranges."""
  rows = [
    [f'`{name}`', *(ranged(r[key] for r in found) for key in KEYS.values())]
    for name, found in runs.items()
  ]
  return markdown(('variant', *KEYS), rows)
