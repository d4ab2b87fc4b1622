"""Device memory by buffer, read from the compiler's buffer assignment.

XLA writes, of every buffer, where it lies and when it is alive. What is listed
here is alive at the moment when most is.
"""

import dataclasses
import re
from collections import Counter

from longctx.costs.hlo import parse, shape_bytes, source

# allocation 7: size 262144, color 1, parameter 0, shape |f32[4]| at ...
_ALLOCATION = re.compile(
  r'^allocation \d+: size (\d+)(?:, color (\d+))?(.*):$', re.MULTILINE
)
# value: <1442 add.9{0} (phi) @0> (size=512,offset=0): f32[4]{0:T(128)}
_VALUE = re.compile(
  r'^ value: <\d+ ([\w.\-]+)(\{[\d,]*\})?(?: \(phi\))? @(\d+)> '
  r'\(size=(\d+),offset=\d+\): (\S+)',
  re.MULTILINE,
)
_PEAK = re.compile(r'^    ([\w.\-]+)(\{[\d,]*\}): (\d+) bytes', re.MULTILINE)

FROM_ASSIGNMENT = (
  "alive at the peak, from the compiler's buffer assignment and live ranges"
)
FROM_TEXT = (
  'largest results in the text of the program: no buffer assignment was '
  'written, so that some of them may share memory'
)


@dataclasses.dataclass(frozen=True)
class Buffer:
  """Buffer of a temporary, between arguments and results.

  Attributes:
    name: of the instruction that makes it; of several alike, the first.
    shape: with the element type.
    bytes: of all of them.
    count: buffers of one shape and source.
    source: where the program comes from, JAX's path of transformations.
    line: of the source code; '' where it is not known.
  """

  name: str
  shape: str
  bytes: int
  count: int
  source: str
  line: str


def totals(assignment: str) -> dict[str, int]:
  """Bytes of HBM by part, of a program that was laid out.

  Returns:
    'arguments', 'outputs' that do not take their place, and 'temporaries'.
  """
  found = Counter(arguments=0, outputs=0, temporaries=0)
  for size, color, what in _ALLOCATION.findall(assignment):
    if color not in ('', '0'):
      continue
    if 'parameter' in what:
      found['arguments'] += int(size)
    elif 'output' in what or 'maybe-live-out' in what:
      found['outputs'] += int(size)
    else:
      found['temporaries'] += int(size)
  return dict(found)


def largest(
  text: str, assignment: str, live_ranges: str, *, most: int = 12
) -> tuple[list[Buffer], str]:
  """The largest temporaries of a program, and how they were found.

  Args:
    assignment: the text of its buffer assignment; '' if there is none.
    live_ranges: that of its live ranges.
  """
  computations, entry = parse(text)
  instructions = {
    instruction.name: instruction
    for computation in computations.values()
    for instruction in computation
  }
  arguments = {
    instruction.name
    for instruction in computations[entry]
    if instruction.opcode == 'parameter'
  }
  values = {
    (name, index or '{}'): (int(size), shape)
    for name, index, color, size, shape in _VALUE.findall(assignment)
    if color == '0'
  }
  alive = [
    (name, *values[name, index])
    for name, index, _ in _PEAK.findall(live_ranges)
    if (name, index) in values
    and name not in arguments
    # A tuple is a table of the places of its parts.
    and not values[name, index][1].startswith('(')
  ]
  how = FROM_ASSIGNMENT
  if not alive:
    how = FROM_TEXT
    alive = [
      (instruction.name, shape_bytes(instruction.shape), instruction.shape)
      for instruction in computations[entry]
      if not instruction.shape.startswith('(')
      and instruction.opcode not in ('parameter', 'bitcast')
    ]
  files = _files(text)
  together: dict[tuple[str, str], list[tuple[str, int, str]]] = {}
  for name, size, shape in alive:
    made_by = instructions.get(name)
    path = source(made_by) if made_by else ''
    frame = made_by and re.search(r'stack_frame_id=(\d+)', made_by.attributes)
    line = files.get(int(frame[1]), '') if frame else ''
    plain = re.sub(r'\{.*', '', shape)
    key = plain, path or re.sub(r'[.\d]+$', '', name)
    together.setdefault(key, []).append((name, size, line))
  found = [
    Buffer(
      members[0][0],
      shape,
      sum(size for _, size, _ in members),
      len(members),
      source,
      members[0][2],
    )
    for (shape, source), members in together.items()
  ]
  return sorted(found, key=lambda b: -b.bytes)[:most], how


def _files(text: str) -> dict[int, str]:
  """Lines of this library by the id of a stack frame, where there are any.

  HLO lists names of files, locations in them, and frames that name a location
  and their caller.
  """
  tables: dict[str, dict[int, str]] = {}
  table = None
  for line in text.splitlines():
    if line in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
      table = tables.setdefault(line, {})
    elif table is not None and (entry := re.match(r'(\d+) (.+)$', line)):
      table[int(entry[1])] = entry[2]
    elif line.strip():
      table = None
  names = tables.get('FileNames', {})
  locations = {}
  for number, location in tables.get('FileLocations', {}).items():
    file = re.search(r'file_name_id=(\d+)', location)
    at = re.search(r' line=(\d+)', location)
    if file and at:
      name = names.get(int(file[1]), '').strip('"')
      _, inside, rest = name.rpartition('/longctx/')
      locations[number] = f'longctx/{rest}:{at[1]}' if inside else ''
  frames = {}
  # The first frame has no parent: where it names itself, ids are one too high.
  first = tables.get('StackFrames', {}).get(1, '')
  shift = 'parent_frame_id=1}' in first
  for number, frame in tables.get('StackFrames', {}).items():
    place = re.search(r'file_location_id=(\d+)', frame)
    parent = re.search(r'parent_frame_id=(\d+)', frame)
    frames[number] = (
      locations.get(int(place[1]), '') if place else '',
      int(parent[1]) - shift if parent else 0,
    )

  def nearest(number: int) -> str:
    # Frames of JAX and Flax lie in between.
    for _ in range(len(frames)):
      line, parent = frames.get(number, ('', 0))
      if line or number not in frames or parent == number:
        return line
      number = parent
    return ''

  return {number: nearest(number) for number in frames}
