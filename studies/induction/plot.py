"""When models learn to copy, and what their induction heads match."""

import pathlib

from longctx.training import figures
from studies.claims import markdown, ranged
from studies.common import by_run

TITLE = (
  'Repeated permutations of 64 symbols, 64 tokens; attention alone, width 64, '
  '4 heads'
)


def show(rows, folder: pathlib.Path):
  """Writes induction.png and table.md."""
  runs = by_run(rows)
  figure, (curves, scores) = figures.axes(2, title=TITLE)
  for name, style in figures.styles(runs).items():
    steps = [step for step, _ in runs[name][0]['curve']]
    seeds = [[value for _, value in row['curve']] for row in runs[name]]
    line = {**style, 'label': name, 'markevery': 4}
    figures.over_seeds(curves, steps, zip(*seeds, strict=True), line)
    matching = [best(row, 'prefix_matching') for row in runs[name]]
    points = {**style, 'ls': '', 'ms': 7, 'alpha': 0.7}
    scores.plot(matching, [row['accuracy'] for row in runs[name]], **points)
  figures.name_range(curves, 'range over seeds; to the right one mark a seed')
  curves.set(xlabel='step', ylabel='accuracy of scored tokens')
  scores.set(
    xlabel='prefix matching of the best head',
    ylabel='accuracy of scored tokens',
    xlim=(-0.03, 1.03),
    ylim=curves.get_ylim(),
  )
  figures.legend_below(figure)
  figures.save(figure, folder / 'induction.png')
  (folder / 'table.md').write_text(table(runs))


def best(row, score: str) -> float:
  """The largest score of any head."""
  return max(value for layer in row[score] for value in layer or [0.0])


SHOWN = {
  'accuracy': lambda row: row['accuracy'],
  'prefix matching': lambda row: best(row, 'prefix_matching'),
  'previous token': lambda row: best(row, 'previous_token'),
  'in-context score': lambda row: row['icl_score'],
  'without induction heads': lambda row: (
    row['ablation'].get('induction', {}).get('accuracy')
  ),
}


def table(runs) -> str:
  """Markdown: medians and ranges."""
  rows = [
    [f'`{name}`', *(ranged(map(shown, found)) for shown in SHOWN.values())]
    for name, found in runs.items()
  ]
  return markdown(('model', *SHOWN), rows)
