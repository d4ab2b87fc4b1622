"""Bits per byte of each schedule of windows, seed by seed."""

import pathlib

from longctx.training import figures
from studies.claims import markdown, ranged
from studies.common import by_run
from studies.window_schedule.config import SCHEDULES

TITLE = (
  'Bytes of the Python standard library, 256 tokens; 4 layers of width 64, '
  'windows of 30 bytes on average'
)

# Longformer's table 4: bits per character of text8, by schedule.
PUBLISHED = {
  'decreasing': 1.24,
  'fixed': 1.23,
  'increasing': 1.21,
  'dilated': 1.20,
}


def show(rows, folder: pathlib.Path):
  """Writes window_schedule.png and table.md."""
  runs = by_run(rows)
  names = [name for name in SCHEDULES if name in runs]
  figure, (bits, differences) = figures.axes(2, title=TITLE)
  # A seed's schedules see the same batches.
  seeds = zip(*(runs[name] for name in names), strict=True)
  seeds = {f'seed {found[0]["seed"]}': found for found in seeds}
  for label, style in figures.styles(seeds).items():
    ys = [row['bits'] for row in seeds[label]]
    bits.plot(names, ys, label=label, **style)
    differences.plot(names, [y - ys[0] for y in ys], label=label, **style)
  published = [PUBLISHED[name] - PUBLISHED[names[0]] for name in names]
  grey = {'color': '0.4', 'ls': ':', 'marker': 'x'}
  differences.plot(names, published, label='published, text8', **grey)
  bits.set(xlabel='windows, first layer to last', ylabel='bits per byte')
  differences.set(
    xlabel='windows, first layer to last',
    ylabel=f'bits per byte above {names[0]}',
  )
  figures.legend_below(figure)
  figures.save(figure, folder / 'window_schedule.png')
  (folder / 'table.md').write_text(table(runs, names))


def table(runs, names) -> str:
  """Markdown: bits per byte, and differences within seeds."""
  rows = []
  for name in names:
    windows = [x.partition('window=')[2].split(',')[0] for x in SCHEDULES[name]]
    found = [row['bits'] for row in runs[name]]
    pairs = zip(runs[name], runs[names[0]], strict=True)
    above = [one['bits'] - base['bits'] for one, base in pairs]
    cells = (ranged(values, digits=4) for values in (found, above))
    rows.append([name, ', '.join(windows), *cells])
  head = ('schedule', 'windows', 'bits per byte', 'above `decreasing`')
  return markdown(head, rows)
