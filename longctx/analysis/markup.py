"""HTML tables, charts and attention maps that need no other file."""

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from longctx.typing import Float, Num

Number = float | int

# From here on one decimal will do.
LARGE = 10

# Shades of a picture: few, so that hundreds of pictures stay small, and odd, so
# that one of them is zero.
SHADES = 65
WIDTH, HEIGHT = 480, 260
# Of a map, and of the labels to its left.
MAP, MAP_LEFT = 128, 66
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 26, 40

STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
h3 { font-size: 1em; margin: 0 0 .2em; }
p, li { max-width: 75ch; } .note { opacity: .75; font-size: .87em; }
code { font-size: .92em; overflow-wrap: anywhere; }
.side { display: grid; gap: 1.6em 2em;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.box:has(td:nth-child(6)) { grid-column: 1 / -1; }
.box { max-width: 100%; } .box .note { max-width: 46ch; margin: 0 0 .4em; }
.scroll { overflow: auto; max-height: 32em; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .5em; text-align: right; font-size: .87em; }
th { font-weight: 500; white-space: nowrap; }
td { border: 1px solid var(--line); min-width: 3.2em; }
td.words { text-align: left; }
tr > th:first-child { text-align: left; }
tr:first-child th { white-space: normal; vertical-align: bottom; }
.facts td { border: 0; text-align: left; overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 1em 1em 0; }
figcaption { font-size: .8em; padding-left: 66px; }
.map { font-size: 10px; } .map image { image-rendering: pixelated; }
.map rect { fill: none; stroke: var(--line); }
svg { max-width: 100%; height: auto; font-size: 11px; }
svg text { fill: currentColor; } svg .axis { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 2; } svg .band { fill: #e69f0044; }
svg .key { stroke: none; }
.c0 { stroke: #3b8fd0; fill: #3b8fd0; } .c1 { stroke: #e0662a; fill: #e0662a; }
.c2 { stroke: #12a37c; fill: #12a37c; } .c3 { stroke: #c977a9; fill: #c977a9; }
"""


def escape(text: Any) -> str:
  return html.escape(str(text))


def number(value: Number | None, *, coarse: bool = False) -> str:
  """A number in few characters, and '–' for none.

  Args:
    value: as it is.
    coarse: whether it stands among large ones, and has as few decimals.
  """
  if value is None or not np.isfinite(value):
    return '–'
  if isinstance(value, int):
    return f'{value:,}'
  size = abs(value)
  if 0 < size < 1e-3:
    return f'{value:.0e}'
  return f'{value:,.1f}' if coarse or size >= LARGE else f'{value:.3f}'


def page(title: str, body: Sequence[str]) -> str:
  """A whole file."""
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n'
    + '\n'.join(body)
    + '\n</body></html>\n'
  )


def note(text: str) -> str:
  return f'<p class="note">{escape(text)}</p>'


def box(title: str, text: str, content: str) -> str:
  """Something with a title, a line that explains it, beside others."""
  return f'<div class="box"><h3>{escape(title)}</h3>{note(text)}{content}</div>'


def facts(rows: dict[str, Any]) -> str:
  """Names and values in two columns."""
  lines = (
    f'<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>'
    for name, value in rows.items()
  )
  return f'<table class="facts">{"".join(lines)}</table>'


def table(
  rows: Sequence[Sequence[Number | str | None]],
  *,
  names: Sequence[str],
  columns: Sequence[str],
  top: Number | None = None,
) -> str:
  """A table of numbers, coloured where `top` says what is strongest.

  Blue is above zero and orange below, over whatever the page's own colour is.

  Args:
    rows: cells; short rows are filled up with '–'.
    names: of the rows.
    columns: names of the columns.
    top: size of a number that has the full colour; None for no colours.
  """
  head = ''.join(f'<th>{escape(column)}</th>' for column in columns)
  lines = [f'<tr><th></th>{head}</tr>']
  rows = [[*row, *[None] * (len(columns) - len(row))] for row in rows]
  # Decimals of a column stand below each other.
  coarse = [
    any(isinstance(y, Number) and abs(y) >= LARGE for y in column)
    for column in zip(*rows, strict=True)
  ]
  for name, cells in zip(names, rows, strict=True):
    found = (
      _cell(value, f'{name}, {column}', top, large)
      for value, column, large in zip(cells, columns, coarse, strict=True)
    )
    lines.append(f'<tr><th>{escape(name)}</th>{"".join(found)}</tr>')
  return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _cell(
  value: Number | str | None, name: str, top: Number | None, coarse: bool
) -> str:
  if isinstance(value, str):
    return f'<td class="words">{escape(value)}</td>'
  style, exact, text = '', 'no such score', number(value, coarse=coarse)
  if value is not None:
    exact = f'{value:.6g}'
    if top:
      hue = '0,114,200' if value >= 0 else '222,100,20'
      strength = 0.6 * min(abs(value) / top, 1)
      style = f' style="background:rgba({hue},{strength:.2f})"'
  return f'<td title="{escape(name)}: {exact}"{style}>{text}</td>'


def chart(
  series: dict[str, tuple[Sequence[Number], Sequence[Number | None]]],
  *,
  x: str,
  y: str,
  band: tuple[Number, Number] | None = None,
) -> str:
  """Lines over numbers as SVG.

  Args:
    series: name -> (xs, ys); a line has a gap where y is None.
    x: what is drawn to the right.
    y: what is drawn upwards.
    band: from where to where x is shaded.
  """
  points = [
    (at, value)
    for xs, ys in series.values()
    for at, value in zip(xs, ys, strict=True)
    if value is not None
  ]
  if not points:
    return note('Nothing was measured.')
  across, up = zip(*points, strict=True)
  x_ticks = MaxNLocator(5).tick_values(min(across), max(across))
  y_ticks = MaxNLocator(5).tick_values(min(0, *up), max(up))
  right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
  to_x = _scale(x_ticks[0], x_ticks[-1], LEFT, right)
  to_y = _scale(y_ticks[0], y_ticks[-1], bottom, TOP)
  parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">']
  if band:
    low, high = map(to_x, band)
    parts.append(
      f'<rect class="band" x="{low:.1f}" y="{TOP}" '
      f'width="{max(high - low, 1):.1f}" height="{bottom - TOP}"/>'
    )
  for tick in y_ticks:
    at = to_y(tick)
    parts.append(
      f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{at:.1f}" '
      f'y2="{at:.1f}"/>' + _text(LEFT - 6, at + 4, f'{tick:,.6g}', 'end')
    )
  for tick in x_ticks:
    parts.append(_text(to_x(tick), bottom + 16, f'{tick:,.6g}'))
  parts.append(_text((LEFT + right) / 2, HEIGHT - 6, x))
  parts.append(_text(-(TOP + bottom) / 2, 12, y, turned=True))
  for index, (name, (xs, ys)) in enumerate(series.items()):
    parts += _line(f'c{index % 4}', name, xs, ys, to_x, to_y)
  keys = ' '.join(
    f'<tspan class="key c{index % 4}" dx="8">●</tspan> {escape(name)}'
    for index, name in enumerate(series)
  )
  legend = f'<text x="{LEFT}" y="14">{keys}</text>'
  return ''.join([*parts, legend if len(series) > 1 else '', '</svg>'])


def _scale(low: Number, high: Number, start: Number, end: Number):
  return lambda value: start + (value - low) / (high - low) * (end - start)


def _line(color, name, xs, ys, to_x, to_y) -> list[str]:
  parts, pieces = [], [[]]
  for at, value in zip(xs, ys, strict=True):
    if value is None:
      pieces.append([])
      continue
    pieces[-1].append(f'{to_x(at):.1f},{to_y(value):.1f}')
    if len(xs) <= 100:
      parts.append(
        f'<circle class="{color}" cx="{to_x(at):.1f}" cy="{to_y(value):.1f}" '
        f'r="2.5"><title>{escape(name)} at {at:,.6g}: {number(value)}'
        '</title></circle>'
      )
  lines = (
    f'<polyline class="{color}" style="fill:none" points="{" ".join(piece)}"/>'
    for piece in pieces
    if piece
  )
  return [*lines, *parts]


def picture(
  values: Float[np.ndarray, 'Q S'], title: str, *, seq_len: int
) -> str:
  """A map of queries (down) and keys (right), with axes of their positions.

  The square root of its values as shades, from zero to the largest value; where
  values are negative, from minus the largest size to the largest size, zero
  being white.

  Args:
    values: means over blocks of queries and of keys.
    title: shown under the pointer.
    seq_len: tokens that the blocks divide.
  """
  signed = is_signed(values)
  top = max(float(np.abs(values).max()), 1e-9)
  shade = np.sign(values) * np.sqrt(np.abs(values) / top)
  shade = (shade + 1) / 2 if signed else np.maximum(shade, 0)
  codes = np.round(shade * (SHADES - 1)).astype(np.uint8)
  colors = matplotlib.colormaps['RdBu_r' if signed else 'magma']
  palette = colors(np.linspace(0, 1, SHADES), bytes=True)[:, :3]
  data = base64.b64encode(png(codes, palette)).decode()
  right, bottom = MAP_LEFT + MAP, MAP + 4
  parts = [
    f'<svg class="map" width="{right + 14}" height="{bottom + 30}" role="img">'
    f'<image x="{MAP_LEFT}" y="4" width="{MAP}" height="{MAP}" '
    f'preserveAspectRatio="none" href="data:image/png;base64,{data}">'
    f'<title>{escape(title)}</title></image>'
    f'<rect x="{MAP_LEFT}" y="4" width="{MAP}" height="{MAP}"/>'
  ]
  for at in (0, seq_len // 2, seq_len - 1):
    place = MAP * (at + 0.5) / seq_len
    anchor = 'end' if at == seq_len - 1 else 'middle'
    parts.append(_text(MAP_LEFT + place, bottom + 12, f'{at:,}', anchor))
    parts.append(_text(MAP_LEFT - 4, 8 + place, f'{at:,}', anchor='end'))
  parts.append(_text(MAP_LEFT + MAP / 2, bottom + 25, 'key'))
  parts.append(_text(-4 - MAP / 2, 11, 'query', turned=True))
  return ''.join([*parts, '</svg>'])


def _text(
  x: Number, y: Number, text: str, anchor: str = 'middle', turned: bool = False
) -> str:
  """A label of an SVG, perhaps read upwards."""
  turn = ' transform="rotate(-90)"' if turned else ''
  return (
    f'<text{turn} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
    f'{escape(text)}</text>'
  )


def is_signed(values: Float[np.ndarray, '...']) -> bool:
  """Whether a map has negative values, and not by rounding alone."""
  return bool(values.min() < -1e-4 * np.abs(values).max())


def png(
  codes: Num[np.ndarray, 'Q S'], palette: Num[np.ndarray, 'C 3']
) -> bytes:
  """A PNG with a palette, a quarter of the size of one without."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    end = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + end

  height, width = codes.shape
  lines = b''.join(b'\0' + row.tobytes() for row in codes)
  return b''.join(
    [
      b'\x89PNG\r\n\x1a\n',
      chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 3, 0, 0, 0)),
      chunk(b'PLTE', palette.tobytes()),
      chunk(b'IDAT', zlib.compress(lines, 9)),
      chunk(b'IEND', b''),
    ]
  )
