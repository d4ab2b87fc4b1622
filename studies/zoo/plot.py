"""Accuracy, speed of learning and state bytes of every variant."""

import pathlib

from longctx.training import figures
from studies.claims import markdown, number

TITLE = (
  'MQAR, 8 pairs in 64 tokens; two layers of width 64 behind a short '
  'convolution, 400 steps'
)


def show(entries, folder: pathlib.Path):
  """Writes zoo.png and table.md of variants.json."""
  figure, plots = figures.axes(3, title=TITLE)
  figure.set_size_inches(13, 1.5 + 0.22 * len(entries))
  places = range(len(entries))
  labels = ('accuracy', 'steps to 90%', 'state bytes')
  for axis, label in zip(plots, labels, strict=True):
    names = [entry['variant'] for entry in entries if axis is plots[0]]
    axis.set_yticks(places, names or [''] * len(entries))
    axis.set(xlabel=label, ylim=(len(entries) - 0.4, -0.6))
  accuracy, reached, state = plots
  _dots(accuracy, [entry['accuracy'] for entry in entries])
  figures.mark(accuracy, entries[0]['chance'], 'chance', ':')
  # Those that never got there stand behind the end of the training.
  end = 1.15 * entries[0]['steps']
  at = [entry['steps_to_90'] for entry in entries]
  never = [place for place in places if at[place]['median'] is None]
  there = [{k: v or end for k, v in one.items()} for one in at]
  _dots(reached, there, hidden=never)
  reached.plot(
    [end] * len(never),
    never,
    'x',
    color=figures.COLORS[1],
    label='not within the training',
  )
  figures.mark(reached, entries[0]['steps'], 'end of the training')
  grows = lambda entry: {'median': entry['state_bytes']}
  _dots(state, [grows(entry) for entry in entries])
  state.set_xscale('log', base=2)
  figures.legend_below(figure)
  figures.save(figure, folder / 'zoo.png')
  (folder / 'table.md').write_text(table(entries))


def _dots(axis, found, hidden=()):
  """A median a line, in its range, but where it is hidden."""
  places = range(len(found))
  color = figures.COLORS[0]
  low, high = ([f.get(k, f['median']) for f in found] for k in ('low', 'high'))
  axis.hlines(places, low, high, color=color, lw=2, label='range over seeds')
  shown = [place for place in places if place not in hidden]
  middle = [found[place]['median'] for place in shown]
  axis.plot(middle, shown, 'o', color=color, label='median')


def table(entries) -> str:
  """Markdown: medians and ranges."""
  head = ('variant', 'accuracy', 'to 90%', 'parameters', 'state bytes')
  rows = []
  for entry in entries:
    cells = [f'`{entry["variant"]}`']
    for key, shown in (('accuracy', number), ('steps_to_90', _steps)):
      middle, low, high = (shown(v) for v in entry[key].values())
      never = entry[key]['low'] is None
      cells.append('never' if never else f'{middle} ({low} to {high})')
    cells += [f'{entry[key]:,}' for key in ('parameters', 'state_bytes')]
    rows.append([*cells, f'{entry["tokens_per_second"]["median"]:,.0f}'])
  return markdown((*head, 'tokens/s'), rows)


def _steps(value) -> str:
  return 'never' if value is None else f'{value:.0f}'
