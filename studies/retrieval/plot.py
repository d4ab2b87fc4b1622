"""Draws the separation, recall against bytes and the law.

python -m studies.retrieval.plot
"""

import pathlib
import statistics

from longctx.training import figures, metrics

HERE = pathlib.Path(__file__).parent


def show(rows, folder: pathlib.Path):
  """Writes retrieval.png and table.md."""
  figure, (curves, answered, recalled, law) = figures.axes(4)
  of_runs = {}
  for row in rows:
    experiment, _, name = row['run'].partition('/')
    of_runs.setdefault(experiment, {}).setdefault(name, []).append(row)
  draw_curves(curves, of_runs.get('curves', {}))
  sizes = of_runs.get('sizes', {})
  draw_sizes(answered, sizes, 'capacity', 'pairs answered at 90%')
  draw_sizes(recalled, sizes, 'recalled', 'pairs recalled at once')
  draw_law(law, of_runs.get('capacity', {}))
  figures.save(figure, folder / 'retrieval.png')
  tables = [
    '## Two layers, against state bytes\n',
    size_table(sizes),
    '## One layer, against random keys\n',
    table(of_runs.get('capacity', {})),
  ]
  (folder / 'table.md').write_text('\n'.join(tables))


def median(values) -> float:
  return statistics.median(values)


def draw_curves(axis, runs):
  for index, (name, rows) in enumerate(runs.items()):
    color = figures.COLORS[index]
    for row in rows:
      label = name if row is rows[0] else None
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


def draw_sizes(axis, runs, key: str, label: str):
  """A figure of each memory against its bytes, sizes of a kind joined."""
  kinds = {}
  for name, rows in sorted(runs.items(), key=lambda item: bytes_of(item[1])):
    kinds.setdefault(name.split()[0], []).append(rows)
  for index, (kind, memories) in enumerate(sorted(kinds.items())):
    found = [[row[key] for row in rows] for rows in memories]
    middle = [median(values) for values in found]
    axis.errorbar(
      [bytes_of(rows) for rows in memories],
      middle,
      yerr=[
        [m - min(values) for m, values in zip(middle, found, strict=True)],
        [max(values) - m for m, values in zip(middle, found, strict=True)],
      ],
      color=figures.COLORS[index % len(figures.COLORS)],
      marker='o' if index < len(figures.COLORS) else 's',
      ms=5,
      lw=1,
      label=kind,
    )
  axis.set_xscale('log', base=2)
  axis.set_yscale('symlog', base=2, linthresh=1)
  axis.set(xlabel='state bytes', ylabel=label, ylim=(0, 90))
  if kinds:
    axis.legend(frameon=False, fontsize=8)


def bytes_of(rows) -> int:
  return rows[0]['state_bytes']


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


def size_table(runs) -> str:
  """Markdown: both figures, accuracies and the rates that were best."""
  if not runs:
    return ''
  pairs = next(iter(runs.values()))[0]['pairs']
  titles = ['memory', 'state bytes', 'best rate', 'pairs at 90%', 'at once']
  titles += [f'{n} pairs' for n in pairs]
  lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
  for name, rows in sorted(runs.items(), key=lambda item: bytes_of(item[1])):
    rates = sorted({row['rate'] for row in rows})
    cells = [name, f'{bytes_of(rows):,}', ', '.join(f'{r:g}' for r in rates)]
    for key in ('capacity', 'recalled'):
      found = [row[key] for row in rows]
      cells.append(
        f'{median(found):.1f} ({min(found):.1f} to {max(found):.1f})'
      )
    for index in range(len(pairs)):
      cells.append(f'{median(row["accuracy"][index] for row in rows):.2f}')
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


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
  for name, rows in sorted(runs.items(), key=lambda item: bytes_of(item[1])):
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
