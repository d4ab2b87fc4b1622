"""Draws when models learn to copy, and what their heads match.

python -m studies.induction.plot
"""

import pathlib

from longctx.training import figures, metrics
from studies.claims import ranged

HERE = pathlib.Path(__file__).parent
MAIN = ('two_layers', 'one_layer', 'one_layer-convolution')


def show(rows, folder: pathlib.Path):
  """Writes induction.png and table.md."""
  names = list(dict.fromkeys(row['run'] for row in rows))
  figure, (curves, scores) = figures.axes(2)
  for index, name in enumerate(names):
    color = figures.COLORS[index % len(figures.COLORS)]
    style = '-' if index < len(figures.COLORS) else '--'
    for number, row in enumerate(r for r in rows if r['run'] == name):
      steps, accuracies = zip(*row['curve'], strict=True)
      label = name if number == 0 else None
      curves.plot(steps, accuracies, color=color, ls=style, lw=1.2, label=label)
      scores.plot(
        _best(row, 'prefix_matching'),
        row['accuracy'],
        ls='none',
        marker='osv^D*PXhd'[index % 10],
        color=color,
      )
  curves.set_xlabel('step')
  curves.set_ylabel('accuracy of scored tokens')
  scores.set_xlabel('prefix matching of the best head')
  scores.set_ylabel('accuracy of scored tokens')
  figures.legend_below(figure, curves)
  figures.save(figure, folder / 'induction.png')
  (folder / 'table.md').write_text(table(rows, names))


def _best(row, score: str) -> float:
  return max(value for layer in row[score] for value in layer or [0.0])


def table(rows, names) -> str:
  """Markdown: medians and ranges."""
  lines = [
    '| model | accuracy | prefix matching | previous token | '
    'in-context score | without induction heads |',
    '|---|---|---|---|---|---|',
  ]
  figures_of = (
    lambda row: row['accuracy'],
    lambda row: _best(row, 'prefix_matching'),
    lambda row: _best(row, 'previous_token'),
    lambda row: row['icl_score'],
    lambda row: row['ablation'].get('induction', {}).get('accuracy'),
  )
  for name in names:
    cells = []
    for figure in figures_of:
      values = [figure(row) for row in rows if row['run'] == name]
      values = [value for value in values if value is not None]
      if not values:
        cells.append('–')
        continue
      cells.append(ranged(values))
    lines.append(f'| `{name}` | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def main():
  show(metrics.read_lines(HERE / 'results.jsonl'), HERE)


if __name__ == '__main__':
  main()
