"""What each way to answer recovers, and accuracy against distractors."""

import pathlib
import statistics

from longctx.training import figures
from studies.claims import markdown, ranged
from studies.common import by_run

TITLE = (
  'Questions among opinions, 112 tokens; 2 layers of full attention, width 64, '
  '4 heads, a short convolution'
)

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
  figure, (bars, *lines) = figures.axes(3, title=TITLE)
  draw_bars(bars, usual)
  asked = [r for r in usual if r['model'] != 'even']
  names = dict.fromkeys(who(r) for r in asked if r['distractors'] == 256)
  styles = figures.styles(names)
  for axis, condition in zip(lines, ('none', 'suggest_wrong'), strict=True):
    mine = [row for row in asked if row['condition'] == condition]
    draw_lines(axis, mine, styles)
    axis.set_title(f'opinions: {condition.replace("_", " ")}', fontsize=10)
  figures.legend_below(figure)
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
  labels = {'even': 'trained at agree = 0.9', 'rewriter': 'at 0.95'}
  for index, (model, label) in enumerate(labels.items()):
    found = [
      [r['accuracy'] for r in rows if (r['model'], who(r)) == (model, name)]
      for name in names
    ]
    # A quick run has one of the two trainings.
    if all(found):
      figures.bars(axis, found, label=label, index=index)
  axis.set_xticks(range(len(names)), names, rotation=40, ha='right')
  axis.set_title('opinions: suggest wrong, 8 distractors', fontsize=10)
  axis.set_ylabel('accuracy')
  figures.name_range(axis, 'range over seeds', bars=True)


def draw_lines(axis, rows, styles):
  """Accuracy against distractors, by method."""
  for name, style in styles.items():
    mine = [row for row in rows if who(row) == name]
    counts = sorted({row['distractors'] for row in mine})
    found = [
      [row['accuracy'] for row in mine if row['distractors'] == n]
      for n in counts
    ]
    line = {**style, 'label': name}
    figures.over_seeds(axis, counts, found, line, bars=True)
  axis.set_xscale('log', base=2)
  axis.set(xlabel='distractors', ylim=(-0.03, 1.03))


KEYS = (
  *('accuracy', 'recovered', 'precision', 'recall', 'dropped', 'opinion'),
  'invented',
)


def table(rows) -> str:
  """Every condition, number of distractors and method: medians and ranges."""
  lines = []
  for mine in by_run(rows).values():
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
    found = [ranged(row.get(key) for row in mine) for key in KEYS]
    cells += ['' if cell == '–' else cell for cell in found]
    for key, scale in (('flops', 1e-6), ('seconds', 1e3)):
      cells.append(f'{scale * statistics.median(r[key] for r in mine):.1f}')
    lines.append(cells)
  head = ('condition', 'distractors', 'method', *KEYS, 'MFLOP', 'ms')
  return markdown(head, lines)
