"""Draws what each way to answer recovers, and accuracy against distractors.

python -m studies.s2a.plot
"""

import pathlib
import statistics

import numpy as np

from longctx.training import figures, metrics
from studies.claims import ranged

HERE = pathlib.Path(__file__).parent

# Method -> the paper's name of it.
METHODS = {
  'baseline': 'baseline',
  'instructed': 'Instructed',
  'not_instructed': 'S2A-NI',
  'keep_original': 'S2A-KeepOrig',
  'single': 'S2A-Single',
  's2a': 'S2A',
  'random_drop': 'random drop',
  'oracle': 'oracle',
  'gate': 'gate',
}


def show(rows, folder: pathlib.Path):
  """Writes s2a.png and table.md."""
  usual = [row for row in rows if is_usual(row)]
  figure, (bars, *lines) = figures.axes(3)
  draw_bars(bars, usual)
  for axis, condition in zip(lines, ('none', 'suggest_wrong'), strict=True):
    mine = [r for r in usual if r['condition'] == condition]
    draw_lines(axis, [r for r in mine if r['model'] != 'even'])
    axis.set_title(condition.replace('_', ' '))
  figures.legend_below(figure, lines[0])
  figures.save(figure, folder / 's2a.png')
  (folder / 'table.md').write_text(table(rows))


def is_usual(row) -> bool:
  """Each opinion once, and of a gate the one span that the fact is."""
  spans = {'gate': 1}.get(row['model'], 0)
  return row['opinions'] == row['mentions'] == 1 and row.get('keep', 0) == spans


def who(row) -> str:
  if row['method'] == 'gate':
    return row['model'].replace('_', ', from ')
  if row['model'] == 'window':
    return 'windows'
  return METHODS[row['method']]


def draw_bars(axis, rows):
  """Accuracy against a wrong suggestion, by how good opinions were."""
  rows = [
    row
    for row in rows
    if row['condition'] == 'suggest_wrong' and row['distractors'] == 8
  ]
  names = list(METHODS.values())[:-1]
  for index, (model, label) in enumerate(
    (('even', 'trained at agree = 0.9'), ('rewriter', 'at 0.95'))
  ):
    found = [
      [r['accuracy'] for r in rows if (r['model'], who(r)) == (model, name)]
      for name in names
    ]
    if not all(found):
      # A quick run has one of the two trainings.
      continue
    middles = [statistics.median(f) for f in found]
    errors = np.array(
      [[m - min(f), max(f) - m] for m, f in zip(middles, found, strict=True)]
    ).T
    places = np.arange(len(names)) + 0.4 * index - 0.2
    color = figures.COLORS[index]
    axis.bar(places, middles, 0.4, color=color, label=label)
    axis.errorbar(places, middles, errors, fmt='none', color='0.2', lw=1)
  axis.set_xticks(range(len(names)), names, rotation=40, ha='right')
  axis.set_title('suggest wrong, 8 distractors')
  axis.set_ylabel('accuracy')
  if axis.get_legend_handles_labels()[1]:
    axis.legend(frameon=False, fontsize=8)


def draw_lines(axis, rows):
  """Accuracy against distractors, by method."""
  names = list(
    dict.fromkeys(who(row) for row in rows if row['distractors'] == 256)
  )
  for index, name in enumerate(names):
    mine = [row for row in rows if who(row) == name]
    counts = sorted({row['distractors'] for row in mine})
    found = [
      [row['accuracy'] for row in mine if row['distractors'] == n]
      for n in counts
    ]
    middles = [statistics.median(f) for f in found]
    errors = np.array(
      [[m - min(f), max(f) - m] for m, f in zip(middles, found, strict=True)]
    ).T
    color = figures.COLORS[index % len(figures.COLORS)]
    axis.errorbar(
      counts, middles, errors, color=color, marker='o', ms=3, label=name
    )
  axis.set_xscale('log', base=2)
  axis.set_xlabel('distractors')
  axis.set_ylim(-0.03, 1.03)


def table(rows) -> str:
  """Every condition, number of distractors and method: medians and ranges."""
  keys = (
    'accuracy',
    'recovered',
    'precision',
    'recall',
    'dropped',
    'opinion',
    'invented',
  )
  head = ['condition', 'distractors', 'method', *keys, 'MFLOP', 'ms']
  lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
  for name in dict.fromkeys(row['run'] for row in rows):
    mine = [row for row in rows if row['run'] == name]
    first = mine[0]
    condition = first['condition'].replace('_', ' ')
    if first['opinions'] > 1:
      condition += f', {first["opinions"]} times'
    if first['sentences'] > 1000:
      condition += ', 65,536 tokens'
    method = who(first) + ' (agree = 0.9)' * (first['model'] == 'even')
    if first.get('keep'):
      method += f' ({first["keep"]} span)'
    cells = [condition, str(first['distractors']), method]
    for key in keys:
      values = [row[key] for row in mine if row.get(key) is not None]
      cells.append(ranged(values) if values else '')
    for key, scale in (('flops', 1e-6), ('seconds', 1e3)):
      cells.append(f'{scale * statistics.median(r[key] for r in mine):.1f}')
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  show(metrics.read_lines(HERE / 'results.jsonl'), HERE)
