"""HLO costs: bytes that a compiled program sends, read from its text."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

# Bytes that all devices together send in one execution of a collective, from
# the bytes of the operand on one device, the size and the number of groups.
_SENT: dict[str, Callable[[int, int, int], int]] = {
  # Every device's shard goes to each of the others.
  'all-gather': lambda operand, size, groups: (
    operand * (size - 1) * size * groups
  ),
  # Of the operand, a device keeps one part in `size`.
  'all-to-all': lambda operand, size, groups: operand * (size - 1) * groups,
  'reduce-scatter': lambda operand, size, groups: operand * (size - 1) * groups,
  # A reduce-scatter, and the gathering of its result.
  'all-reduce': lambda operand, size, groups: operand * 2 * (size - 1) * groups,
}
_UNKNOWN = ('collective-broadcast', 'ragged-all-to-all')
KINDS = ('collective-permute', *_SENT)

# What libtpu calls a fused all-reduce of which each device keeps a slice, and
# the work that it fuses with a collective which goes on meanwhile.
SCATTER, MEANWHILE = 'all-reduce-scatter', 'async_collective_fusion'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """HLO instruction: `name = shape opcode(operands), attributes`."""

  name: str
  shape: str
  opcode: str
  operands: str
  attributes: str


@dataclasses.dataclass(frozen=True)
class ProgramCost:
  """Program cost of one run: memory and bytes sent.

  Attributes:
    device_bytes: held by one device: arguments, results and what lies between.
    wire_bytes: sent by all devices together, see `collective_bytes`.
  """

  device_bytes: int
  wire_bytes: dict[str, int]


def program_cost(compiled: Any) -> ProgramCost:
  """The cost of `jax.jit(f).lower(*args).compile()`, as its compiler says."""
  memory = compiled.memory_analysis()
  held = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
  return ProgramCost(held, collective_bytes(compiled.as_text()))


def collective_bytes(hlo_text: str) -> dict[str, int]:
  """The bytes that all devices together send in one run of a program.

  Per execution, with b the bytes of the operand on one device:

    collective-permute   b per pair of different source and target
    all-gather           b (size - 1) per device of a group
    all-to-all           b (size - 1) / size
    reduce-scatter       b (size - 1) / size
    all-reduce           2 b (size - 1) / size

  the least that any algorithm sends, and what a ring does. What is inside a
  loop counts once per trip; of a conditional, the branch that sends most
  counts.

  On CPUs the compiler sends bfloat16 as float32: to compare with a formula,
  compile in float32 there.

  Args:
    hlo_text: `jax.jit(f).lower(*args).compile().as_text()`.

  Returns:
    The bytes by kind, for each of `KINDS`.

  Raises:
    ValueError: a loop with collectives has no known number of trips.
    NotImplementedError: there is a collective of another kind.
  """
  devices = num_devices(hlo_text)
  computations, entry = parse(hlo_text)
  shapes = {
    instruction.name: instruction.shape
    for computation in computations.values()
    for instruction in computation
  }
  counted = {}

  def count(name):
    if name not in counted:
      total = collections.Counter()
      for instruction in computations[name]:
        total.update(sent_bytes(instruction, shapes, devices))
        total.update(_called_bytes(instruction, computations, count))
      if name.startswith(SCATTER):
        total['reduce-scatter'] += total.pop('all-reduce', 0) // 2
      counted[name] = (
        collections.Counter() if continues(name, computations) else total
      )
    return counted[name]

  total = count(entry)
  return {kind: total[kind] for kind in KINDS}


def continues(name: str, computations: dict[str, list[Instruction]]) -> bool:
  """Whether a fusion names a collective that another one has started.

  libtpu's asynchronous collectives are fusions: one that starts, some that do
  other work meanwhile, and one that waits for the end. All contain the
  collective, which is sent once.
  """
  return name.startswith(MEANWHILE) or any(
    'custom_call_target="AsyncCollectiveDone"' in instruction.attributes
    for instruction in computations[name]
    if instruction.opcode == 'custom-call'
  )


def parse(hlo_text: str) -> tuple[dict[str, list[Instruction]], str]:
  """({computation: its instructions}, name of the entry computation)."""
  computations, entry, current = {}, None, None
  for line in hlo_text.splitlines():
    # A header starts in the first column, an instruction does not.
    if header := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (instruction := _parse_instruction(line)):
      current.append(instruction)
  if entry is None:
    raise ValueError('the text has no ENTRY computation: pass compiled HLO')
  return computations, entry


def _parse_instruction(line):
  """`  ROOT %name = shape opcode(operands), attributes`, or None."""
  # The opcode is the first word before a parenthesis: that of a tiled layout,
  # T(8,128), stands behind a colon and in capitals.
  head = re.match(
    r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(', line
  )
  if head is None:
    return None
  depth = 1
  for end in range(head.end(), len(line)):
    depth += {'(': 1, ')': -1}.get(line[end], 0)
    if depth == 0:
      break
  return Instruction(*head.groups(), line[head.end() : end], line[end + 1 :])


def num_devices(hlo_text: str) -> int:
  """Devices that run a compiled program together."""
  return math.prod(
    int(count)
    for count in re.findall(
      r'(?:num_partitions|replica_count)=(\d+)', hlo_text.split('\n', 1)[0]
    )
  )


def sent_bytes(
  instruction: Instruction, shapes: dict[str, str], devices: int
) -> dict[str, int]:
  """{kind: bytes} of one execution of one instruction.

  Args:
    instruction: any one; of most, nothing is sent.
  """
  kind = instruction.opcode.removesuffix('-start')
  if kind in _UNKNOWN:
    raise NotImplementedError(f'no rule for the bytes of {kind}')
  if kind not in KINDS:
    return {}
  operand = operand_bytes(instruction, shapes)
  if kind == 'collective-permute':
    pairs = re.search(
      r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', instruction.attributes
    )
    pairs = re.findall(r'(\d+),(\d+)', pairs[1])
    return {kind: operand * sum(source != target for source, target in pairs)}
  size, groups = _groups(instruction.attributes, devices)
  return {kind: _SENT[kind](operand, size, groups)}


def operand_bytes(instruction: Instruction, shapes: dict[str, str]) -> int:
  """Bytes of what an instruction reads, on one device."""
  operands = re.findall(r'%([\w.\-]+)', instruction.operands)
  return sum(shape_bytes(shapes[name]) for name in operands)


def _called_bytes(instruction, computations, count):
  """{kind: bytes} of the computations that an instruction runs."""
  # The done of an asynchronous call names the computation that it ends.
  if instruction.opcode.endswith(('-update', '-done')):
    return {}
  attributes = instruction.attributes
  if instruction.opcode == 'while':
    body = count(attribute('body', attributes))
    if not any(body.values()):
      return {}
    times = trips(instruction, computations)
    return {kind: times * sent for kind, sent in body.items()}
  if instruction.opcode == 'conditional':
    branches = map(count, branch_names(instruction))
    return max(branches, key=lambda branch: sum(branch.values()))
  if instruction.opcode.removesuffix('-start') in ('call', 'fusion', 'async'):
    return count(attribute('(?:calls|to_apply)', attributes))
  return {}


def branch_names(conditional: Instruction) -> list[str]:
  """The computations that a conditional chooses from."""
  attributes = conditional.attributes
  if names := re.search(r'branch_computations=\{(.*?)\}', attributes):
    return re.findall(r'[\w.\-]+', names[1])
  return [
    attribute(f'{branch}_computation', attributes)
    for branch in ('true', 'false')
  ]


def source(instruction: Instruction) -> str:
  """JAX's path of transformations to an instruction, '' where it has none."""
  found = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return found[1] if found else ''


def attribute(name: str, attributes: str) -> str:
  """The computation that an instruction names as its `name`."""
  return re.search(rf'\b{name}=%?([\w.\-]+)', attributes)[1]


def trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
  """How often a while loop runs.

  Raises:
    ValueError: the text does not say.
  """
  known = re.search(
    r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes.replace(' ', '')
  )
  if known:
    return int(known[1])
  # The loops of scan and fori_loop run while i < n, from 0 in steps of 1.
  condition = computations[attribute('condition', loop.attributes)]
  limits = [
    int(instruction.operands)
    for instruction in condition
    if instruction.opcode == 'constant' and instruction.shape[0] in 'su'
  ]
  if len(limits) != 1:
    raise ValueError(
      f'the loop {loop.name} has collectives and no known number of trips; '
      'use jax.lax.scan, or jax.lax.fori_loop with Python integers'
    )
  return limits[0]


def _groups(attributes, devices):
  """(devices of a group, number of groups)."""
  attributes = attributes.replace(' ', '')
  # mesh['data'=2,'seq'=4]{'seq'}, where an axis may be split: 'seq':(1)2.
  if mesh := re.search(
    r'replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}', attributes
  ):
    axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    size = math.prod(int(part or axes[name]) for name, part in parts)
    return size, math.prod(map(int, axes.values())) // size
  # [groups,size]<=[devices], perhaps of a transposed mesh.
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=', attributes):
    return int(iota[2]), int(iota[1])
  groups = re.search(r'replica_groups=\{(\{.*?\})?\}', attributes)
  if groups is None or groups[1] is None:
    return devices, 1
  groups = re.findall(r'\{([\d,]+)\}', groups[1])
  return len(groups[0].split(',')), len(groups)


def shape_bytes(shape: str) -> int:
  """Bytes of an array or a tuple of arrays: `(f32[4,12]{1,0}, s32[])`."""
  total = 0
  for dtype, sizes in re.findall(r'\b([a-z][a-z0-9]*)\[([\d,]*)\]', shape):
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    total += math.prod(map(int, filter(None, sizes.split(',')))) * bits // 8
  return total
