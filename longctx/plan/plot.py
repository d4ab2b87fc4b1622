"""Figure of a plan: memory by part, and hops as a timeline."""

import dataclasses
import functools
import pathlib
from typing import Any

from longctx.plan.hops import Pass
from longctx.plan.planner import Plan
from longctx.training import figures

LABELS = (
  'compute: own keys, then those of each hop',
  'send the keys of the next hop',
)

# Hops that are drawn; the others are like them.
DRAWN = 4


def plot(plan: Plan, path: pathlib.Path) -> None:
  """Writes a PNG."""
  figure, (left, right) = figures.axes(2)
  _memory(left, plan)
  _timeline(right, plan)
  mesh = ' x '.join(f'{name} {n}' for name, n in plan.mesh.items())
  figure.suptitle(
    f'{plan.topology}, {mesh}: {plan.batch_size} x {plan.seq_len:,} tokens',
    fontsize=11,
  )
  figures.save(figure, path)


def _memory(axis: Any, plan: Plan):
  """A bar per part, and all of them on the limit."""
  parts = {
    name: n / 2**30
    for name, n in dataclasses.asdict(plan.memory).items()
    if name != 'limit' and (n or name != 'padding')
  }
  limit, total = plan.memory.limit / 2**30, plan.memory.total / 2**30
  names = [*parts, 'all']
  sizes = [*parts.values(), total]
  colors = [figures.COLORS[0]] * len(parts)
  last = figures.COLORS[1] if total > limit else '0.3'
  places = range(len(names))
  axis.barh(places, sizes, color=[*colors, last], height=0.7)
  axis.axvline(limit, color='0.2', ls='--', lw=1.2)
  edge = 1.18 * max(limit, total)
  text = f'{limit:.4g} GiB to have '
  axis.text(limit, -0.75, text, fontsize=8, ha='right', color='0.2')
  for place, size in zip(places, sizes, strict=True):
    axis.text(size + edge / 100, place, f'{size:,.2f}', va='center', fontsize=9)
  axis.set_yticks(places, names)
  axis.set_ylim(len(names) - 0.4, -1.1)
  axis.set_xlim(0, edge)
  axis.grid(axis='y', visible=False)
  axis.set_xlabel('GiB of a device')
  axis.set_title('memory', fontsize=10)


def _timeline(axis: Any, plan: Plan):
  """The first hops of the longest ring, computing above sending."""
  rings = [(kind.layer, r) for kind in plan.attention for r in kind.rings]
  axis.grid(axis='y', visible=False)
  if not rings:
    axis.set_axis_off()
    axis.text(0.5, 0.5, f'no ring: {plan.scheme}', ha='center', va='center')
    return
  layer, ring = max(rings, key=lambda one: one[1].forward.hops)
  rows = (('forward', ring.forward, 0.0), ('backward', ring.backward, 2.6))
  end = 0.0
  for name, one, top in rows:
    end = max(end, _hops(axis, one, top, label=name == 'forward'))
  axis.set_yticks(
    [0, 1, 2.6, 3.6],
    ['forward: compute', 'send', 'backward: compute', 'send'],
  )
  axis.set_ylim(4.3, -0.7)
  axis.set_xlim(0, 1.02 * end)
  axis.set_xlabel('milliseconds, by formula')
  shown = min(DRAWN, ring.forward.hops)
  axis.set_title(
    f'{layer}: the first {shown} of {ring.forward.hops} hops', fontsize=10
  )
  figures.legend_below(axis.figure)


def _hops(axis: Any, one: Pass, top: float, *, label: bool) -> float:
  """Bars of one pass, returning where they end."""
  compute, send = one.compute_seconds * 1e3, one.transfer_seconds * 1e3
  now = 0.0
  for hop in range(min(DRAWN, one.hops) + 1):
    # Own keys first, while those of hop 1 are on their way.
    busy = one.own_seconds * 1e3 if hop == 0 else compute
    sends = send if hop < one.hops else 0.0
    labels = LABELS if label and hop == 0 else (None, None)
    bar = functools.partial(axis.barh, left=now, height=0.8)
    bar(top, busy, color=figures.COLORS[5 * (hop % 2)], label=labels[0])
    bar(top + 1, sends, color=figures.COLORS[1], label=labels[1])
    name = 'own' if hop == 0 else str(hop)
    color = 'black' if hop % 2 else 'white'
    place = (now + busy / 2, top)
    axis.text(*place, name, ha='center', va='center', fontsize=8, color=color)
    now += max(busy, sends)
  return now
