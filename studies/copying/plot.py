"""Copying against length, and errors against the bound."""

import pathlib

from longctx.training import figures
from studies.claims import markdown, ranged
from studies.common import by_run, middles
from studies.copying.bound import least_error

TITLE = (
  'Copying up to 50 of 26 letters; 2 layers of width 64, 4 heads, a short '
  'convolution'
)
TRAINED_AT = 50


def show(rows, folder: pathlib.Path):
  """Writes copying.png and table.md."""
  runs = by_run(rows)
  figure, (letters, errors) = figures.axes(2, title=TITLE)
  for name, style in figures.styles(runs).items():
    found = runs[name]
    lengths = found[0]['lengths']
    line = {**style, 'label': name}
    right = zip(*(row['letters_right'] for row in found), strict=True)
    figures.over_seeds(letters, lengths, right, line)
    if 'bound' in found[0]:
      wrong = [[1 - x for x in row['strings_right']] for row in found]
      figures.over_seeds(errors, lengths, zip(*wrong, strict=True), line)
      # The bound turns within a letter or two.
      fine = [2 * 1.01**i for i in range(900)]
      least = [least_error(found[0]['state_bits'], n) for n in fine]
      label = f'least error of {name}'
      thin = {**style, 'ls': (0, (1, 1)), 'marker': '', 'lw': 2.5, 'alpha': 0.5}
      errors.plot(fine, least, **thin, label=label)
  for axis in (letters, errors):
    figures.mark(axis, TRAINED_AT, 'longest in training')
    axis.set_xscale('log')
    axis.set(xlabel='letters', ylim=(-0.03, 1.03))
  figures.level(letters, 1 / 26, 'chance')
  figures.name_range(letters, 'range over seeds')
  letters.set_ylabel('letters copied, in context')
  errors.set_ylabel('strings with an error')
  figures.legend_below(figure)
  figures.save(figure, folder / 'copying.png')
  (folder / 'table.md').write_text(table(runs))


def table(runs) -> str:
  """Markdown: letters right by length; whole strings in brackets."""
  lengths = next(iter(runs.values()))[0]['lengths']
  rows, bounds = [], []
  for name, found in runs.items():
    right, whole = (
      middles(found, key) for key in ('letters_right', 'strings_right')
    )
    cells = [f'{a:.2f} ({b:.2f})' for a, b in zip(right, whole, strict=True)]
    rows.append([name, *cells])
    if 'bound' in found[0]:
      bits = found[0]['state_bits']
      first = next(n for n in range(1, 10**7) if least_error(bits, n))
      used = ranged((row['effective_bits'] for row in found), digits=0)
      bounds.append([name, f'{bits:,}', f'{first:,} letters', used])
  head = ('model', 'state bits', 'bound above 0 from', 'effective bits')
  by_length = markdown(['model', *(f'{n:,}' for n in lengths)], rows)
  return f'{by_length}\n{markdown(head, bounds)}'
