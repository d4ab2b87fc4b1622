"""Draws who leans on BOS, and what it costs to lose it.

python -m studies.sinks.plot
"""

import pathlib
import statistics

import numpy as np

from longctx.training import figures, metrics
from studies.claims import ranged

HERE = pathlib.Path(__file__).parent


def show(rows, folder: pathlib.Path):
  """Writes sinks.png and table.md."""
  names = list(dict.fromkeys(row['run'] for row in rows))
  of = lambda name, key: [row[key] for row in rows if row['run'] == name]
  figure, (bars, points) = figures.axes(2)
  for shift, key, color in (
    (-0.2, 'dormant', figures.COLORS[0]),
    (0.2, 'active', figures.COLORS[1]),
  ):
    middles = [statistics.median(of(name, key)) for name in names]
    lows = [m - min(of(n, key)) for n, m in zip(names, middles, strict=True)]
    highs = [max(of(n, key)) - m for n, m in zip(names, middles, strict=True)]
    label = {'dormant': 'at rest', 'active': 'at triggers'}[key]
    places = np.arange(len(names)) + shift
    bars.bar(places, middles, 0.4, color=color, label=label)
    bars.errorbar(places, middles, [lows, highs], fmt='none', color='0.2', lw=1)
  bars.set_xticks(range(len(names)), names, rotation=30, ha='right')
  bars.set_ylabel('attention to BOS')
  bars.legend(frameon=False)
  for index, name in enumerate(names):
    lost = np.subtract(of(name, 'evicted_loss'), of(name, 'loss'))
    points.plot(
      of(name, 'first_token'),
      lost,
      ls='none',
      marker='osv^D*PXh'[index % 9],
      color=figures.COLORS[index % len(figures.COLORS)],
      label=name,
    )
  points.set_xlabel('attention to BOS')
  points.set_ylabel('nats per token lost with BOS')
  figures.legend_below(figure, points)
  figures.save(figure, folder / 'sinks.png')
  (folder / 'table.md').write_text(table(rows, names))


def table(rows, names) -> str:
  """Markdown: medians and ranges."""
  lines = [
    '| variant | sink rate | at rest | at triggers | loss | without BOS |',
    '|---|---|---|---|---|---|',
  ]
  keys = ('sink_rate', 'dormant', 'active', 'loss', 'evicted_loss')
  for name in names:
    cells = []
    for key in keys:
      values = [row[key] for row in rows if row['run'] == name]
      cells.append(ranged(values))
    lines.append(f'| `{name}` | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def main():
  show(metrics.read_lines(HERE / 'results.jsonl'), HERE)


if __name__ == '__main__':
  main()
