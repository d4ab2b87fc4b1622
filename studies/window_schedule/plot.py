"""Draws bits per byte of each schedule, seed by seed.

python -m studies.window_schedule.plot
"""

import pathlib
import statistics

from longctx.training import figures, metrics
from studies.window_schedule.config import SCHEDULES

HERE = pathlib.Path(__file__).parent

# Longformer's table 4: bits per character of text8, by schedule.
PUBLISHED = {
  'decreasing': 1.24,
  'fixed': 1.23,
  'increasing': 1.21,
  'dilated': 1.20,
}


def show(rows, folder: pathlib.Path):
  """Writes window_schedule.png and table.md."""
  figure, (bits, differences) = figures.axes(2)
  names = [n for n in SCHEDULES if any(row['run'] == n for row in rows)]
  seeds = list(dict.fromkeys(row['seed'] for row in rows))
  for index, seed in enumerate(seeds):
    found = {r['run']: r['bits'] for r in rows if r['seed'] == seed}
    style = dict(
      color=figures.COLORS[index % len(figures.COLORS)], marker='o', ms=5, lw=1
    )
    ys = [found[n] for n in names]
    bits.plot(names, ys, label=f'seed {seed}', **style)
    differences.plot(names, [y - ys[0] for y in ys], **style)
  differences.plot(
    names,
    [PUBLISHED[n] - PUBLISHED[names[0]] for n in names],
    color='0.4',
    ls='--',
    label='published, text8',
  )
  bits.set_ylabel('bits per byte')
  differences.set_ylabel(f'bits per byte above {names[0]}')
  differences.legend(frameon=False, fontsize=9)
  figures.legend_below(figure, bits)
  figures.save(figure, folder / 'window_schedule.png')
  (folder / 'table.md').write_text(table(rows, names))


def table(rows, names) -> str:
  """Markdown: bits per byte, and differences within seeds."""
  lines = ['| schedule | windows | bits per byte | above `decreasing` |']
  lines.append('|---|---|---|---|')
  base = {r['seed']: r['bits'] for r in rows if r['run'] == names[0]}
  for name in names:
    found = {r['seed']: r['bits'] for r in rows if r['run'] == name}
    windows = [
      layer.partition('window=')[2].partition(',')[0]
      for layer in SCHEDULES[name]
    ]
    cells = [
      spread(found.values()),
      spread(bits - base[seed] for seed, bits in found.items()),
    ]
    lines.append(f'| {name} | {", ".join(windows)} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def spread(values) -> str:
  values = list(values)
  middle = statistics.median(values)
  return f'{middle:.4f} ({min(values):.4f} to {max(values):.4f})'


if __name__ == '__main__':
  show(metrics.read_lines(HERE / 'results.jsonl'), HERE)
