"""Draws the separation, capacity against bytes and the law.

python -m studies.retrieval.plot
"""

import pathlib
import statistics

from longctx import figures, metrics

HERE = pathlib.Path(__file__).parent


def show(rows, folder: pathlib.Path):
  """Writes retrieval.png and table.md."""
  figure, (curves, sizes, law) = figures.axes(3)
  of_runs = {}
  for row in rows:
    of_runs.setdefault(row['run'], []).append(row)
  draw_curves(curves, {n: r for n, r in of_runs.items() if n[:3] == 'cur'})
  trained = {n[9:]: r for n, r in of_runs.items() if n[:3] == 'cap'}
  draw_sizes(sizes, trained)
  draw_law(law, trained)
  figures.save(figure, folder / 'retrieval.png')
  (folder / 'table.md').write_text(table(trained))


def median(values) -> float:
  return statistics.median(values)


def draw_curves(axis, runs):
  for index, (name, rows) in enumerate(runs.items()):
    color = figures.COLORS[index]
    for row in rows:
      label = name.partition('/')[2] if row is rows[0] else None
      axis.plot(
        [0, *row['steps']],
        [0, *row['validation']],
        color=color,
        marker='o',
        ms=3,
        alpha=0.7,
        label=label,
      )
  axis.axhline(0.6, color='0.4', ls=':', lw=1)
  axis.set(xlabel='step', ylabel='accuracy at 16 pairs', ylim=(-0.03, 1.03))
  axis.legend(frameon=False, fontsize=9)


def draw_sizes(axis, runs):
  kinds = list(dict.fromkeys(name.split()[0] for name in runs))
  for name, rows in runs.items():
    kind = kinds.index(name.split()[0])
    found = [row['capacity'] for row in rows]
    middle = median(found)
    axis.errorbar(
      rows[0]['state_bytes'],
      middle,
      yerr=[[middle - min(found)], [max(found) - middle]],
      color=figures.COLORS[kind % len(figures.COLORS)],
      marker='osD^vP'[kind // len(figures.COLORS) :][0],
      ms=6,
      lw=1,
    )
    axis.annotate(
      name,
      (rows[0]['state_bytes'], middle),
      xytext=(4, 4),
      textcoords='offset points',
      fontsize=6,
    )
  axis.set_xscale('log', base=2)
  axis.set(xlabel='state bytes', ylabel='pairs answered at 90%')


def draw_law(axis, runs):
  axis.plot([0, 1], [0, 1], color='0.4', lw=1)
  axis.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], color='0.9')
  known = {name: rows for name, rows in runs.items() if rows[0]['predicted']}
  kinds = list(dict.fromkeys(name.split()[0] for name in known))
  shown = set()
  for name, rows in known.items():
    kind = name.split()[0]
    index = kinds.index(kind)
    trained = zip(*(row['accuracy'] for row in rows), strict=True)
    untrained = zip(*(row['predicted'] for row in rows), strict=True)
    axis.plot(
      [median(x) for x in untrained],
      [median(x) for x in trained],
      color=figures.COLORS[index % len(figures.COLORS)],
      marker='o' if index < len(figures.COLORS) else 's',
      ls='',
      ms=4,
      label=None if kind in shown else kind,
    )
    shown.add(kind)
  axis.set(
    xlabel='accuracy of random keys, untrained',
    ylabel='accuracy after training',
    xlim=(-0.03, 1.03),
    ylim=(-0.03, 1.03),
  )
  axis.legend(frameon=False, fontsize=8)


def table(runs) -> str:
  """Markdown: trained accuracy, and untrained in brackets."""
  if not runs:
    return ''
  pairs = next(iter(runs.values()))[0]['pairs']
  lines = [
    '| memory | state bytes | pairs at 90% | '
    + ' | '.join(f'{n} pairs' for n in pairs)
    + ' |',
    '|---' * (3 + len(pairs)) + '|',
  ]
  for name, rows in sorted(
    runs.items(), key=lambda item: item[1][0]['state_bytes']
  ):
    found = [row['capacity'] for row in rows]
    cells = []
    for index in range(len(pairs)):
      cell = f'{median(row["accuracy"][index] for row in rows):.2f}'
      if rows[0]['predicted']:
        untrained = median(row['predicted'][index] for row in rows)
        cell += f' ({untrained:.2f})'
      cells.append(cell)
    lines.append(
      f'| {name} | {rows[0]["state_bytes"]:,} | {median(found):.1f} '
      f'({min(found):.1f} to {max(found):.1f}) | {" | ".join(cells)} |'
    )
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  show(metrics.read_lines(HERE / 'results.jsonl'), HERE)
