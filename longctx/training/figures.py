"""Figures: learning curves, sweeps and streams, and their colours and markers.

A mechanism has the colour, marker and line of `styles` in all of them, a legend
names whatever is drawn, and a title says the task and the model.
"""

import itertools
import pathlib
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from longctx.training.log_files import write_whole

Number = float | int

# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLORS = (
  *('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9'),
  '#000000',
)
# Of another number than the colours, so that only the 78th pair comes again.
MARKERS = 'osD^vP*X<>h'
LINES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)))

# Characters of a legend that an inch holds.
CHARACTERS = 14

# Lines across a plot of accuracy.
LEVELS = ('chance', 'ceiling')

# Mechanisms that studies compare -> their places in the colours, markers and
# lines. Those that stand in one figure have different colours, or are akin.
MECHANISMS = {
  **{'full': 0, 'linear': 1, 'deltanet': 2, 'sliding_window': 3, 'based': 4},
  **{'gla': 5, 'mamba2': 6, 'alibi': 7, 'identity': 8, 'output_gate': 9},
  **{'sigmoid': 10, 'taylor': 11, 'scalable_softmax': 12, 'rope': 13},
  **{'softmax1': 18, 'sink_logits': 19, 'softpick': 20},
}
# What studies call them.
ALSO = {
  **dict.fromkeys(('softmax', 'no_positions', 'two_layers', 'dense'), 'full'),
  **dict.fromkeys(('window', 'windows'), 'sliding_window'),
  **{'elu+1': 'linear', 'delta': 'deltanet', 'scaled': 'scalable_softmax'},
}


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
  """A colour, marker and line for each name, all different.

  A mechanism has the same in every figure; 'linear-convolution' that of
  'linear', unless both are in this one.
  """
  names = list(dict.fromkeys(names))
  places: dict[str, int] = {}
  # Whole names go first, so that those which begin alike make room for them.
  for known in (str, lambda name: re.split(r'[-_, ]', name)[0]):
    for name in names:
      mechanism = ALSO.get(known(name), known(name))
      if name not in places and mechanism in MECHANISMS:
        place = MECHANISMS[mechanism]
        if place not in places.values():
          places[name] = place
  free = (n for n in itertools.count() if n not in places.values())
  for name in names:
    if name not in places:
      places[name] = next(free)
  return {name: _style(places[name]) for name in names}


def _style(place: int) -> dict[str, Any]:
  return {
    'color': COLORS[place % len(COLORS)],
    'marker': MARKERS[place % len(MARKERS)],
    'ls': LINES[place // len(COLORS) % len(LINES)],
  }


def describe(task: Mapping[str, Any], models: Iterable[Any] = ()) -> str:
  """The title of a figure: 'mqar, 64 tokens; 2 layers of width 64: full'.

  Args:
    task: its name and fields.
    models: their `TransformerConfig`s; layers are named where all are alike.
  """
  text = f'{task["name"]}, {task["seq_len"]:,} tokens'
  shapes = {(len(model.layers), model.d_model) for model in models}
  layers = {tuple(dict.fromkeys(model.layers)) for model in models}
  if len(shapes) == 1:
    ((depth, width),) = shapes
    text += f'; {depth} layer{"s" * (depth > 1)} of width {width}'
  if len(layers) == 1:
    text += f': {", ".join(*layers)}'
  return text


def axes(
  columns: int, *, rows: int = 1, title: str = ''
) -> tuple[Figure, list[Any]]:
  """A figure and its plots, row by row."""
  # A Figure of its own: pyplot would keep a global list, and look for a screen.
  size = (5.5 * columns, 4.4 * rows)
  figure = Figure(figsize=size, layout='constrained', dpi=120)
  found = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axis in found:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.25)
  if title:
    figure.suptitle(textwrap.fill(title, 60 * columns), fontsize=11)
  return figure, found


def legend_below(figure: Figure):
  """Whatever has a label in any of the plots, once, below all of them."""
  # Inside the axes it would cover curves that nobody can foresee.
  named = {}
  for axis in figure.axes:
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
      named.setdefault(label, handle)
  figure.legend(
    named.values(),
    named.keys(),
    loc='outside lower center',
    ncols=_columns(list(named), CHARACTERS * figure.get_figwidth()),
    frameon=False,
    fontsize=9,
  )


def _columns(labels: list[str], room: Number) -> int:
  """The most columns of a legend whose longest labels have room."""
  for columns in range(len(labels), 1, -1):
    parts = np.array_split(labels, columns)
    # A handle and its margins are as wide as 7 characters.
    if sum(7 + max(map(len, part)) for part in parts) <= room:
      return columns
  return 1


def save(figure: Figure, path: pathlib.Path):
  """Writes a PNG, and the folder that it lies in."""
  write_whole(path, figure.savefig)


def middle_and_range(
  values: Iterable[Sequence[Number]],
) -> tuple[list[Number], list[Number], list[Number]]:
  """(medians, smallest, largest) of what several seeds have at each place."""
  found = [list(at) for at in values]
  return (
    [statistics.median(at) for at in found],
    [min(at) for at in found],
    [max(at) for at in found],
  )


def over_seeds(
  axis: Any,
  xs: Sequence[Number],
  values: Iterable[Sequence[Number]],
  style: Mapping[str, Any],
  *,
  bars: bool = False,
):
  """A line of medians in its range over seeds.

  Args:
    axis: to draw in.
    xs: places.
    values: at each of them, those of the seeds.
    style: of the line, its label included.
    bars: whether a range is a bar and not a band.
  """
  middle, low, high = middle_and_range(values)
  axis.plot(xs, middle, **{'ms': 5, 'lw': 1.5, **style})
  if bars:
    axis.vlines(xs, low, high, color=style['color'], lw=1)
  else:
    axis.fill_between(xs, low, high, color=style['color'], alpha=0.15, lw=0)


def bars(
  axis: Any, values: Iterable[Sequence[Number]], *, label: str, index: int
):
  """Bars of medians in their ranges over seeds, first or second of a pair."""
  middle, low, high = middle_and_range(values)
  places = [n + 0.4 * index - 0.2 for n in range(len(middle))]
  look = {'color': COLORS[index], 'hatch': ('', '///')[index % 2]}
  axis.bar(places, middle, 0.4, **look, ec='white', label=label)
  axis.vlines(places, low, high, color='0.2', lw=1)


def name_range(axis: Any, text: str, *, bars: bool = False):
  """The line of a legend that says what bands or bars are."""
  if bars:
    axis.plot([], [], color='0.4', lw=1, marker='|', ms=9, ls='', label=text)
  else:
    axis.fill_between([], [], [], color='0.4', alpha=0.25, lw=0, label=text)


def level(axis: Any, value: Number, label: str, ls: str = ':'):
  """A horizontal line, as of chance."""
  axis.axhline(value, color='0.4', ls=ls, lw=1.2, label=label)


def mark(axis: Any, place: Number, label: str, ls: str = '-'):
  """A vertical line, as at the length of training."""
  axis.axvline(place, color='0.6', lw=1, ls=ls, label=label)


def training(
  path: pathlib.Path,
  curves: dict[str, list[dict[str, Any]]],
  *,
  results: dict[str, dict[str, Any]],
  title: str = '',
):
  """Accuracy and loss against steps, for one run or several.

  Where a run's accuracy jumped, its interval is shaded.

  Args:
    path: of the PNG.
    curves: the lines of each run's metrics.jsonl, by name.
    results: each run's results.json, for its test accuracy and chance.
    title: see `describe`.
  """
  figure, (accuracy, loss) = axes(2, title=title)
  train = {'marker': '', 'ls': '-', 'lw': 0.7, 'alpha': 0.5}
  for name, style in styles(curves).items():
    label = f'{name or "validation"} (test {results[name]["accuracy"]:.3f})'
    drawn = {'train': train, 'validation': {'lw': 1.8, 'ms': 4, 'label': label}}
    for split, more in drawn.items():
      points = [row for row in curves[name] if row['split'] == split]
      steps = [row['step'] for row in points]
      for axis, key in ((accuracy, 'accuracy'), (loss, 'loss')):
        axis.plot(steps, [row[key] for row in points], **{**style, **more})
    # results.json of an earlier version lacks it.
    if change := results[name].get('phase_change'):
      label = f'phase change{" of " * bool(name)}{name}'
      for axis in (accuracy, loss):
        axis.axvspan(
          change['low'],
          change['high'],
          color=style['color'],
          alpha=0.15,
          label=label,
        )
  accuracy.plot([], [], color='0.4', **train, label='on training batches')
  _levels(accuracy, *(next(iter(results.values()))[k] for k in LEVELS))
  for axis, label in ((accuracy, 'accuracy'), (loss, 'nats per scored token')):
    axis.set(xlabel='step', ylabel=label)
  legend_below(figure)
  save(figure, path)


def _levels(axis: Any, chance: Number, ceiling: Number):
  level(axis, chance, f'chance {chance:.3g}')
  level(axis, ceiling, f'ceiling {ceiling:.3g}', '--')
  axis.set_ylim(-0.03, 1.03)


def stream(
  path: pathlib.Path,
  curves: dict[str, list[list[dict[str, Any]]]],
  *,
  trained_at: int,
  title: str = '',
):
  """Loss along a stream, for each way to forget.

  Args:
    path: of the PNG.
    curves: the lines of each policy, see `longctx.evaluation.streaming`, of one
      seed or of several, whose range is shaded.
    trained_at: length in training, marked by a vertical line.
    title: see `describe`.
  """
  figure, (axis,) = axes(1, title=title)
  seeds = max(map(len, curves.values()))
  for index, (name, style) in enumerate(styles(curves).items()):
    # Thinner over thicker, so that curves which agree are all seen.
    below = len(curves) - 1 - index
    losses = [
      [row['loss'] for row in at] for at in zip(*curves[name], strict=True)
    ]
    style |= {'lw': 1.5 + 0.7 * below, 'ms': 4 + below, 'label': name}
    over_seeds(axis, [row['end'] for row in curves[name][0]], losses, style)
  if seeds > 1:
    name_range(axis, f'range over {seeds} seeds')
  mark(axis, trained_at, f'trained: {trained_at:,}')
  axis.set_xscale('log', base=2)
  axis.set(xlabel='position in the stream', ylabel='nats per token')
  legend_below(figure)
  save(figure, path)


def sweep(
  path: pathlib.Path,
  curves: dict[str, list[dict[str, Any]]],
  *,
  parameter: str,
  trained_at: Any,
  title: str = '',
):
  """Accuracy against a task parameter, with 95% intervals.

  Args:
    path: of the PNG.
    curves: the measured lines of each run, by name.
    parameter: the task's field that was swept.
    trained_at: its value in training, marked by a vertical line.
    title: see `describe`.
  """
  figure, (axis,) = axes(1, title=title)
  for index, (name, style) in enumerate(styles(curves).items()):
    xs, ys, low, high = (
      [row[key] for row in curves[name]]
      for key in ('value', 'accuracy', 'low', 'high')
    )
    below = len(curves) - 1 - index
    style |= {'lw': 1.5 + 0.7 * below, 'ms': 4 + below}
    axis.plot(xs, ys, label=name or 'accuracy', **style)
    axis.fill_between(xs, low, high, color=style['color'], alpha=0.2, lw=0)
  name_range(axis, '95% interval')
  for key, ls in zip(LEVELS, (':', '--'), strict=True):
    ys = [row[key] for row in next(iter(curves.values()))]
    axis.plot(xs, ys, color='0.4', ls=ls, lw=1.2, label=key)
  mark(axis, trained_at, f'trained: {trained_at:,}')
  if min(xs) > 0 and max(xs) >= 4 * min(xs):
    axis.set_xscale('log', base=2)
    axis.set_xticks(xs, [f'{x:,}' for x in xs])
    axis.minorticks_off()
  axis.set(ylim=(-0.03, 1.03), ylabel='accuracy', xlabel=parameter)
  legend_below(figure)
  save(figure, path)
