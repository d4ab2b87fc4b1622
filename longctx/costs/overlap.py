"""Overlap of collectives with compute, read from a scheduled program.

The text of a compiled program lists instructions in the order in which they
start. A collective that is split into a start and a done is under way between
the two; whether it takes longer than what runs there, the text does not say.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from longctx.costs.hlo import (
  KINDS,
  SCATTER,
  Instruction,
  attribute,
  branch_names,
  continues,
  num_devices,
  operand_bytes,
  parse,
  sent_bytes,
  source,
  trips,
)

Computations = Mapping[str, Sequence[Instruction]]

START, DONE = 'async-collective-start', 'async-collective-done'


@dataclasses.dataclass(frozen=True)
class Transfer:
  """Collective transfer of a program, and what runs meanwhile.

  Attributes:
    name: of the instruction that starts it.
    kind: as in `hlo.KINDS`.
    wire_bytes: sent by all devices together, each time.
    times: that it runs in one step; None where the text does not say.
    source: where the program comes from, JAX's path of transformations.
    asynchronous: whether it has a start and a done.
    between: what runs from one to the other and takes time: kernels, products,
      loops.
  """

  name: str
  kind: str
  operand_bytes: int
  wire_bytes: int
  times: int | None
  in_loop: bool
  source: str
  asynchronous: bool
  between: tuple[str, ...]

  @property
  def overlapped(self) -> bool:
    return bool(self.between)

  @property
  def part(self) -> str:
    """Of the training step: 'forward', 'forward again' or 'backward'."""
    if 'rematted_computation' in self.source:
      return 'forward again'
    return 'backward' if 'transpose(' in self.source else 'forward'


def transfers(hlo_text: str) -> list[Transfer]:
  """All collectives of a scheduled program that send something."""
  computations, entry = parse(hlo_text)
  runs = executions(computations, entry)
  devices = num_devices(hlo_text)
  shapes = {
    instruction.name: instruction.shape
    for computation in computations.values()
    for instruction in computation
  }
  found = []
  for name, (times, in_loop) in runs.items():
    for index, instruction in enumerate(computations[name]):
      collective, fused_in = _collective(instruction, computations)
      if collective is None:
        continue
      ((kind, sent),) = sent_bytes(collective, shapes, devices).items()
      if fused_in.startswith(SCATTER):
        kind, sent = 'reduce-scatter', sent // 2
      done = _done(instruction, computations[name], index)
      between = computations[name][index + 1 : done] if done else ()
      found.append(
        Transfer(
          instruction.name,
          kind,
          operand_bytes(collective, shapes),
          sent,
          times,
          in_loop,
          source(instruction) or source(collective),
          done is not None,
          _work(between, computations),
        )
      )
  return found


def executions(
  computations: Computations, entry: str
) -> dict[str, tuple[int | None, bool]]:
  """How often the computations that are no fusions run, and if in a loop.

  Args:
    entry: the name of the first one.

  Returns:
    {name: (times, in a loop)}; None where a loop has no known number of trips.
  """
  found = {entry: (1, False)}
  waiting = [entry]
  while waiting:
    name = waiting.pop()
    times, in_loop = found[name]
    for instruction in computations[name]:
      count = times
      if instruction.opcode == 'while':
        called = [attribute('body', instruction.attributes)]
        loop = known_trips(instruction, computations)
        count = None if None in (loop, times) else times * loop
      elif instruction.opcode == 'conditional':
        called = branch_names(instruction)
      elif instruction.opcode == 'call':
        called = [attribute('to_apply', instruction.attributes)]
      else:
        continue
      for child in called:
        found[child] = (count, in_loop or instruction.opcode == 'while')
        waiting.append(child)
  return found


def known_trips(loop: Instruction, computations: Computations) -> int | None:
  """How often a loop runs; None where the text does not say."""
  try:
    return trips(loop, computations)
  except (ValueError, TypeError):
    return None


def _collective(
  instruction: Instruction, computations: Computations
) -> tuple[Instruction | None, str]:
  """The collective that an instruction starts or is, and its computation."""
  if instruction.opcode.removesuffix('-start') in KINDS:
    return instruction, ''
  if instruction.opcode != 'fusion':
    return None, ''
  called = attribute('calls', instruction.attributes)
  if continues(called, computations):
    return None, ''
  for inner in computations[called]:
    if inner.opcode in KINDS:
      return inner, called
  return None, ''


def _done(
  start: Instruction, computation: Sequence[Instruction], index: int
) -> int | None:
  """Where the collective ends that starts at an index; None: right there."""
  if start.name.startswith(START):
    wanted = start.name.replace(START, DONE, 1)
    matches = lambda other: other.name == wanted
  elif start.opcode.endswith('-start'):
    operand = re.compile(rf'%{re.escape(start.name)}(?![\w.\-])')
    matches = lambda other: (
      other.opcode.endswith('-done') and operand.search(other.operands)
    )
  else:
    return None
  for place in range(index + 1, len(computation)):
    if matches(computation[place]):
      return place
  return None


def _work(
  instructions: Sequence[Instruction], computations: Computations
) -> tuple[str, ...]:
  """Names of what takes time: kernels, products and loops."""
  found = []
  for instruction in instructions:
    opcode = instruction.opcode
    if opcode == 'custom-call' and 'tpu_custom_call' in instruction.attributes:
      found.append(f'kernel {kernel_name(instruction)}')
    elif opcode == 'custom-call' and re.search(
      'custom_call_target="__(cublas|cudnn)', instruction.attributes
    ):
      # What GPUs leave to their libraries.
      found.append(f'product {last_name(source(instruction))}'.strip())
    elif opcode == 'while':
      count = known_trips(instruction, computations)
      often = 'a number of' if count is None else count
      found.append(f'loop of {often} trips')
    elif opcode in ('dot', 'convolution') or (
      opcode == 'fusion' and _multiplies(instruction, computations)
    ):
      found.append(f'product {last_name(source(instruction))}'.strip())
  return tuple(found)


def _multiplies(fusion: Instruction, computations: Computations) -> bool:
  called = attribute('calls', fusion.attributes)
  return any(
    inner.opcode in ('dot', 'convolution') for inner in computations[called]
  )


def kernel_name(call: Instruction) -> str:
  """The name of a Pallas kernel."""
  name = re.search(r'([\w.\-]+)/pallas_call', source(call))
  return name[1] if name else re.sub(r'(\.\d+)+$', '', call.name)


def last_name(source: str) -> str:
  """The end of JAX's path to an operation."""
  return source.rpartition('/')[2]


@dataclasses.dataclass(frozen=True)
class Group:
  """Group of collectives that are alike, as a line of a report.

  Attributes:
    kind: as in `hlo.KINDS`.
    part: of the step.
    count: instructions.
    times: how often each runs; None where the text does not say.
    operand_bytes: of the largest, on one device.
    asynchronous: how many have a start and a done.
    overlapped: during how many something runs that takes time.
    between: what that is, of the first one.
  """

  kind: str
  part: str
  in_loop: bool
  count: int
  times: int | None
  operand_bytes: int
  asynchronous: int
  overlapped: int
  between: tuple[str, ...]


def grouped(found: Sequence[Transfer]) -> list[Group]:
  """Transfers by kind, part, loop and number of times, in that order."""
  together: dict[tuple, list[Transfer]] = {}
  for transfer in found:
    key = (transfer.kind, transfer.part, transfer.in_loop, transfer.times)
    together.setdefault(key, []).append(transfer)
  groups = []
  for (kind, part, in_loop, times), members in together.items():
    busy = [member for member in members if member.overlapped]
    groups.append(
      Group(
        kind,
        part,
        in_loop,
        len(members),
        times,
        max(member.operand_bytes for member in members),
        sum(member.asynchronous for member in members),
        len(busy),
        busy[0].between if busy else (),
      )
    )
  order = ('forward', 'forward again', 'backward')
  return sorted(
    groups,
    key=lambda g: (KINDS.index(g.kind), not g.in_loop, order.index(g.part)),
  )
