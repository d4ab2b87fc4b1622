"""Separation of mechanisms, recall against state bytes, and the law."""

import pathlib

from longctx.training import figures
from studies.claims import markdown, ranged
from studies.common import by_run, middles

TITLE = (
  'Multi-query associative recall; one head of width 64 to 128 behind a short '
  'convolution'
)
# As the runs of one experiment are called in the others.
KINDS = {'delta': 'deltanet'}


def show(rows, folder: pathlib.Path):
  """Writes retrieval.png and table.md."""
  of_runs = {'curves': {}, 'sizes': {}, 'capacity': {}}
  for run, found in by_run(rows).items():
    experiment, _, name = run.partition('/')
    of_runs[experiment][name] = found
  sizes, law = of_runs['sizes'], of_runs['capacity']
  figure, plots = figures.axes(2, rows=2, title=TITLE)
  kinds = {kind_of(name) for runs in of_runs.values() for name in runs}
  styles = figures.styles(sorted(kinds))
  draw_curves(plots[0], of_runs['curves'], styles)
  draw_sizes(plots[1], sizes, styles, 'capacity', 'pairs answered at 90%')
  draw_sizes(plots[2], sizes, styles, 'recalled', 'pairs recalled at once')
  draw_law(plots[3], law, styles)
  figures.legend_below(figure)
  figures.save(figure, folder / 'retrieval.png')
  tables = [
    '## Two layers, against state bytes\n',
    table(sizes, ('capacity', 'recalled')),
    '## One layer, against random keys\n',
    table(law, ('capacity',)),
  ]
  (folder / 'table.md').write_text('\n'.join(tables))


def kind_of(name: str) -> str:
  """The mechanism of a memory, 'window' of 'window 8'."""
  kind = name.split()[0]
  return KINDS.get(kind, kind)


def draw_curves(axis, runs, styles):
  for name, rows in runs.items():
    seeds = zip(*([0, *row['validation']] for row in rows), strict=True)
    style = {**styles[kind_of(name)], 'label': kind_of(name)}
    figures.over_seeds(axis, [0, *rows[0]['steps']], seeds, style)
  figures.name_range(axis, 'range over seeds')
  figures.level(axis, 0.6, 'elu+1 is claimed to stay below', '-.')
  axis.set_title('two layers, 16 pairs in 64 tokens', fontsize=10)
  axis.set(xlabel='step', ylabel='accuracy', ylim=(-0.03, 1.03))


def draw_sizes(axis, runs, styles, key: str, label: str):
  """A figure of each memory against its bytes, sizes of a kind joined."""
  kinds = {}
  for name, rows in by_bytes(runs):
    kinds.setdefault(kind_of(name), []).append(rows)
  for index, (kind, memories) in enumerate(kinds.items()):
    seeds = [[row[key] for row in rows] for rows in memories]
    # Side by side where they are equal, so that all ranges are seen.
    shift = 2 ** (0.06 * index - 0.2)
    sizes = [shift * rows[0]['state_bytes'] for rows in memories]
    style = {**styles[kind], 'label': kind}
    figures.over_seeds(axis, sizes, seeds, style, bars=True)
  figures.name_range(axis, 'range over seeds of a memory', bars=True)
  axis.set_xscale('log', base=2)
  axis.set_yscale('symlog', base=2, linthresh=1)
  axis.set_title('two layers, 1 to 64 pairs in 256 tokens', fontsize=10)
  axis.set(
    xlabel='state bytes (kinds side by side)', ylabel=label, ylim=(-0.1, 90)
  )


def by_bytes(runs):
  """(name, rows) from the smallest memory to the largest."""
  return sorted(runs.items(), key=lambda item: item[1][0]['state_bytes'])


def draw_law(axis, runs, styles):
  near = {'color': '0.9', 'label': 'trained within 0.05 of untrained'}
  axis.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], **near)
  for name, rows in runs.items():
    if rows[0]['predicted']:
      style = {**styles[kind_of(name)], 'ls': '', 'label': kind_of(name)}
      axis.plot(middles(rows, 'predicted'), middles(rows, 'accuracy'), **style)
  axis.set_title('one layer, 2 to 16 pairs in 64 tokens', fontsize=10)
  axis.set(
    xlabel='accuracy of random keys, untrained',
    ylabel='accuracy after training',
    xlim=(-0.03, 1.03),
    ylim=(-0.03, 1.03),
  )


TITLES = {'capacity': 'pairs at 90%', 'recalled': 'at once'}


def table(runs, keys) -> str:
  """Markdown: figures, accuracies, and untrained ones in brackets."""
  if not runs:
    return ''
  rated = 'recalled' in keys
  head = ['memory', 'state bytes', *['best rate'] * rated]
  head += [TITLES[key] for key in keys]
  head += [f'{n} pairs' for n in next(iter(runs.values()))[0]['pairs']]
  lines = []
  for name, rows in by_bytes(runs):
    cells = [name, f'{rows[0]["state_bytes"]:,}']
    if rated:
      rates = sorted({row['rate'] for row in rows})
      cells.append(', '.join(f'{rate:g}' for rate in rates))
    cells += [ranged((row[key] for row in rows), digits=1) for key in keys]
    accuracies = [f'{x:.2f}' for x in middles(rows, 'accuracy')]
    if rows[0].get('predicted'):
      pairs = zip(accuracies, middles(rows, 'predicted'), strict=True)
      accuracies = [f'{one} ({other:.2f})' for one, other in pairs]
    lines.append([*cells, *accuracies])
  return markdown(head, lines)
