"""Draws copying against length, and errors against the bound.

python -m studies.copying.plot
"""

import pathlib
import statistics

from longctx.training import figures, metrics
from studies.copying.bound import least_error

HERE = pathlib.Path(__file__).parent
TRAINED_AT = 50
MARKERS = 'osD^vP*X<'


def show(rows, folder: pathlib.Path):
  """Writes copying.png and table.md."""
  runs = {}
  for row in rows:
    runs.setdefault(row['run'], []).append(row)
  figure, (letters, errors) = figures.axes(2)
  for index, (name, found) in enumerate(runs.items()):
    style = dict(
      color=figures.COLORS[index % len(figures.COLORS)],
      marker=MARKERS[index],
      ms=4,
    )
    draw_letters(letters, name, found, style)
    if 'bound' in found[0]:
      draw_errors(errors, name, found, style)
  for axis in (letters, errors):
    axis.axvline(TRAINED_AT, color='0.6', lw=1)
    axis.set_xscale('log')
    axis.set_xlabel('letters (line: longest in training)')
    axis.set_ylim(-0.03, 1.03)
  letters.axhline(1 / 26, color='0.4', ls=':', lw=1)
  letters.set_ylabel('letters copied, in context (dotted: chance)')
  errors.set_ylabel('strings with an error (dashed: bound)')
  figures.legend_below(figure, letters)
  figures.save(figure, folder / 'copying.png')
  (folder / 'table.md').write_text(table(runs))


def middles(found, key: str) -> list[float]:
  return [
    statistics.median(values)
    for values in zip(*(row[key] for row in found), strict=True)
  ]


def draw_letters(axis, name, found, style):
  lengths = found[0]['lengths']
  axis.plot(lengths, middles(found, 'letters_right'), label=name, **style)
  values = list(zip(*(row['letters_right'] for row in found), strict=True))
  axis.fill_between(
    lengths,
    [min(v) for v in values],
    [max(v) for v in values],
    color=style['color'],
    alpha=0.15,
    lw=0,
  )


def draw_errors(axis, name, found, style):
  lengths = found[0]['lengths']
  wrong = [1 - right for right in middles(found, 'strings_right')]
  axis.plot(lengths, wrong, **style)
  # The bound turns within a letter or two.
  fine = [2 * 1.01**i for i in range(900)]
  bits = found[0]['state_bits']
  axis.plot(
    fine, [least_error(bits, n) for n in fine], color=style['color'], ls='--'
  )


def table(runs) -> str:
  """Markdown: letters right by length; whole strings in brackets."""
  lengths = next(iter(runs.values()))[0]['lengths']
  lines = [
    '| model | ' + ' | '.join(f'{n:,}' for n in lengths) + ' |',
    '|---' * (1 + len(lengths)) + '|',
  ]
  for name, found in runs.items():
    right = middles(found, 'letters_right')
    whole = middles(found, 'strings_right')
    cells = [f'{a:.2f} ({b:.2f})' for a, b in zip(right, whole, strict=True)]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  lines += ['', '| model | state bits | bound above 0 from | effective bits |']
  lines += ['|---|---|---|---|']
  for name, found in runs.items():
    if 'bound' in found[0]:
      bits = found[0]['state_bits']
      first = next(n for n in range(1, 10**7) if least_error(bits, n))
      used = [row['effective_bits'] for row in found]
      lines.append(
        f'| {name} | {bits:,} | {first:,} letters | '
        f'{statistics.median(used):.0f} ({min(used):.0f} to {max(used):.0f}) |'
      )
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  show(metrics.read_lines(HERE / 'results.jsonl'), HERE)
