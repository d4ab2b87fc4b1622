"""Figures (matplotlib) of training runs and of evaluation sweeps."""

import pathlib
from typing import Any

from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')


def axes(columns: int) -> tuple[Figure, Any]:
  """A figure and its plots, side by side."""
  # A Figure of its own: pyplot would keep a global list, and look for a screen.
  figure = Figure(figsize=(5.5 * columns, 4), layout='constrained', dpi=120)
  found = figure.subplots(1, columns, squeeze=False)[0]
  for axis in found:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.25)
  return figure, found


def _limits(axis: Any, chance: float, ceiling: float):
  axis.axhline(
    chance, color='0.4', ls=':', lw=1.2, label=f'chance {chance:.3g}'
  )
  axis.axhline(
    ceiling, color='0.4', ls='--', lw=1.2, label=f'ceiling {ceiling:.3g}'
  )
  axis.set_ylim(-0.03, 1.03)
  axis.set_ylabel('accuracy')


def legend_below(figure: Figure, axis: Any):
  """The labels of a plot, below all plots."""
  # Inside the axes it would cover curves that nobody can foresee.
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside lower center',
    ncols=min(len(labels), 4),
    frameon=False,
    fontsize=9,
  )


def save(figure: Figure, path: pathlib.Path):
  """Writes a PNG, and the folder that it lies in."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def training(
  path: pathlib.Path,
  curves: dict[str, list[dict[str, Any]]],
  *,
  results: dict[str, dict[str, Any]],
):
  """Accuracy and loss against steps, for one run or several.

  Where a run's accuracy jumped, its interval is shaded.

  Args:
    path: of the PNG.
    curves: the lines of each run's metrics.jsonl, by name.
    results: each run's results.json, for its test accuracy and chance.
  """
  figure, (accuracy, loss) = axes(2)
  for index, (name, rows) in enumerate(curves.items()):
    color = COLORS[index % len(COLORS)]
    for split, style in (('train', 0.35), ('validation', 1.0)):
      points = [row for row in rows if row['split'] == split]
      xs = [row['step'] for row in points]
      label = None
      if split == 'validation':
        label = f'{name or "validation"} (test {results[name]["accuracy"]:.3f})'
      for axis, key in ((accuracy, 'accuracy'), (loss, 'loss')):
        axis.plot(
          xs,
          [row[key] for row in points],
          color=color,
          alpha=style,
          lw=2 * style,
          marker='o' if split == 'validation' else None,
          ms=3,
          label=label if axis is accuracy else None,
        )
    # results.json of an earlier version lacks it.
    if change := results[name].get('phase_change'):
      for axis in (accuracy, loss):
        axis.axvspan(change['low'], change['high'], color=color, alpha=0.15)
  first = next(iter(results.values()))
  _limits(accuracy, first['chance'], first['ceiling'])
  accuracy.set_title('validation (dots) and training (thin)', fontsize=10)
  legend_below(figure, accuracy)
  loss.set_ylabel('loss (nats per scored token)')
  for axis in (accuracy, loss):
    axis.set_xlabel('step')
  save(figure, path)


def stream(
  path: pathlib.Path,
  curves: dict[str, list[dict[str, Any]]],
  *,
  trained_at: int,
):
  """Loss along a stream, for each way to forget.

  Args:
    path: of the PNG.
    curves: the lines of each policy, see `longctx.evaluation.streaming`.
    trained_at: length in training, marked by a vertical line.
  """
  figure, (axis,) = axes(1)
  for index, (name, rows) in enumerate(curves.items()):
    below = len(curves) - 1 - index
    axis.plot(
      [row['end'] for row in rows],
      [row['loss'] for row in rows],
      color=COLORS[index % len(COLORS)],
      lw=1.5 + below,
      marker='o',
      ms=2 + below,
      label=name,
    )
  axis.axvline(trained_at, color='0.6', lw=1, label=f'trained: {trained_at:,}')
  axis.set_xscale('log', base=2)
  axis.set_xlabel('position in the stream')
  axis.set_ylabel('loss (nats per token)')
  legend_below(figure, axis)
  save(figure, path)


def sweep(
  path: pathlib.Path,
  curves: dict[str, list[dict[str, Any]]],
  *,
  parameter: str,
  trained_at: Any,
):
  """Accuracy against a task parameter, with 95% intervals.

  Args:
    path: of the PNG.
    curves: the measured lines of each run, by name.
    parameter: the task's field that was swept.
    trained_at: its value in training, marked by a vertical line.
  """
  figure, (axis,) = axes(1)
  for index, (name, rows) in enumerate(curves.items()):
    color = COLORS[index % len(COLORS)]
    xs = [row['value'] for row in rows]
    # Thinner over thicker, so that curves which agree are all seen.
    below = len(curves) - 1 - index
    axis.plot(
      xs,
      [row['accuracy'] for row in rows],
      color=color,
      lw=1.5 + 1.5 * below,
      marker='o',
      ms=4 + 2 * below,
      label=name or 'accuracy',
    )
    low = [row['low'] for row in rows]
    high = [row['high'] for row in rows]
    axis.fill_between(xs, low, high, color=color, alpha=0.2, lw=0)
  rows = next(iter(curves.values()))
  xs = [row['value'] for row in rows]
  axis.plot(
    xs, [row['chance'] for row in rows], color='0.4', ls=':', label='chance'
  )
  axis.plot(
    xs, [row['ceiling'] for row in rows], color='0.4', ls='--', label='ceiling'
  )
  axis.axvline(trained_at, color='0.6', lw=1, label=f'trained: {trained_at:,}')
  if min(xs) > 0 and max(xs) >= 4 * min(xs):
    axis.set_xscale('log', base=2)
    axis.set_xticks(xs, [f'{x:,}' for x in xs])
    axis.minorticks_off()
  axis.set_ylim(-0.03, 1.03)
  axis.set_ylabel('accuracy (95% interval)')
  axis.set_xlabel(parameter)
  legend_below(figure, axis)
  save(figure, path)
