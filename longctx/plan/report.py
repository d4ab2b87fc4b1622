"""Report of a plan: text to read, and JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from longctx.costs.overlap import Group, last_name
from longctx.plan.hops import LayerRing, Pass
from longctx.plan.planner import Plan


def to_json(plan: Plan) -> dict[str, Any]:
  """All fields of a plan and what follows from them, for `json.dumps`."""
  memory = {**dataclasses.asdict(plan.memory), 'total': plan.memory.total}
  attention = []
  for kind in plan.attention:
    rings = []
    for ring in kind.rings:
      passes = {
        name: dataclasses.asdict(one)
        | {'ratio': one.ratio, 'hidden': one.hidden}
        for name, one in _passes(ring)
      }
      rings.append({'direction': ring.direction, **passes})
    attention.append({**dataclasses.asdict(kind), 'rings': rings})
  return {
    **dataclasses.asdict(plan),
    'fits': plan.fits,
    'memory': memory,
    'attention': attention,
    'estimate': {
      **dataclasses.asdict(plan.estimate),
      'step': plan.estimate.step,
    },
  }


def text(plan: Plan) -> str:
  """A plan in lines of at most 100 characters."""
  return '\n'.join(
    line
    for part in (
      _heading,
      _memory,
      _work,
      _attention,
      _collectives,
      _temporaries,
      _footing,
    )
    for line in [*part(plan), '']
  ).rstrip()


def _heading(plan: Plan) -> Iterator[str]:
  shape = ' x '.join(f'{name} {n}' for name, n in plan.mesh.items())
  yield (
    f'{plan.topology}: {plan.devices} {plan.kind} devices ({shape}), '
    f'{plan.scheme}, {plan.layout} layout, remat {plan.remat}'
  )
  yield (
    f'a step of {plan.batch_size} x {plan.seq_len:,} tokens, '
    f'{plan.parameters:,} parameters'
  )


def gib(n: float | int) -> str:
  return f'{n / 2**30:,.2f} GiB'


def size(n: float | int) -> str:
  """Bytes in the unit that leaves one to three digits."""
  for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
    if n < 1000 or unit == 'TB':
      return f'{n:,.1f} {unit}' if unit != 'B' else f'{n:.0f} B'
    n /= 1000
  raise AssertionError


def verdict(plan: Plan) -> str:
  """Whether a plan fits, and by how much."""
  memory = plan.memory
  if plan.fits:
    spare = memory.limit - memory.total
    return (
      f'fits: {gib(memory.total)} of {gib(memory.limit)}, {gib(spare)} free'
    )
  over = memory.total - memory.limit
  if over > 0:
    return (
      f'does not fit: {gib(memory.total)} of {gib(memory.limit)}, '
      f'{gib(over)} too much'
    )
  return f'does not fit: {plan.refusal}'


def _memory(plan: Plan) -> Iterator[str]:
  memory = plan.memory
  yield f'memory of a device: {verdict(plan)}'
  for name in dataclasses.asdict(memory):
    if name not in ('limit', 'padding'):
      yield f'  {name:<12} {gib(getattr(memory, name)):>12}'
  if memory.padding > memory.limit / 1000:
    yield f'  {"padding":<12} {gib(memory.padding):>12}'
  if plan.refusal:
    yield f'  the compiler: {plan.refusal}'


def _work(plan: Plan) -> Iterator[str]:
  work, estimate = plan.work, plan.estimate
  yield (
    f'FLOPs of a step: {work.formula:.4g} (three forward passes on allowed '
    'pairs)'
  )
  again = ', attention twice forward' if work.again else ''
  yield (
    f'  the busiest device computes {work.busiest:.4g}, '
    f'{work.busiest * plan.devices / work.formula:.2f} times its share{again}'
  )
  tokens = plan.batch_size * plan.seq_len / estimate.step
  yield (
    f'  by formula a step takes {estimate.step:.3g} s, {estimate.compute:.3g} '
    f'computing and {estimate.exposed:.3g} waiting for transfers: '
    f'{tokens:,.0f} tokens/s'
  )


def _attention(plan: Plan) -> Iterator[str]:
  links = ''
  if plan.hop_links is not None:
    links = f', neighbours at most {plan.hop_links} link(s) apart'
  yield f'attention, per layer{links}'
  for kind in plan.attention:
    yield f'  {kind.count} x {kind.layer}'
    if kind.reason:
      yield f'    no formula: {kind.reason}'
    alike = [ring.forward for ring in kind.rings]
    if len(alike) == 2 and alike[0] == alike[1]:
      yield from _ring(kind.rings[0], ', both ways')
    else:
      for ring in kind.rings:
        yield from _ring(ring)
    if not kind.rings and not kind.reason:
      yield f'    no ring: {plan.scheme} over {plan.mesh["seq"]} devices'


def _passes(ring: LayerRing) -> tuple[tuple[str, Pass], ...]:
  return ('forward', ring.forward), ('backward', ring.backward)


def _ring(ring: LayerRing, ways: str = '') -> Iterator[str]:
  for name, one in _passes(ring):
    yield f'    {name:<8} {_hops(one)}{ways}'


def _hops(one: Pass) -> str:
  hops = 'hop ' if one.hops == 1 else 'hops'
  return (
    f'{one.hops:>3} {hops} of {size(one.hop_bytes):>8}: '
    f'{one.transfer_seconds * 1e3:.3f} ms to send, '
    f'{one.compute_seconds * 1e3:.3f} ms to compute, ratio '
    f'{one.ratio:.3g}: {"hidden" if one.hidden else "not hidden"}'
  )


def _collectives(plan: Plan) -> Iterator[str]:
  wire = ', '.join(
    f'{kind} {size(sent)}' for kind, sent in plan.wire_bytes.items() if sent
  )
  yield f'on all wires, per step: {wire or "nothing"}'
  permute = lambda group: group.kind == 'collective-permute'
  for group in sorted(plan.collectives, key=permute, reverse=True):
    yield f'  {_group(group)}'


def _group(group: Group) -> str:
  often = 'an unknown number of' if group.times is None else group.times
  where = f' in a loop, {often} times' if group.in_loop else ''
  line = (
    f'{group.kind}, {group.part}: {group.count}{where}, up to '
    f'{size(group.operand_bytes)}'
  )
  if not group.asynchronous:
    return f'{line}: synchronous'
  line += f': {group.asynchronous} asynchronous, {group.overlapped} overlapped'
  if group.between:
    line += f' ({between(group.between)})'
  return line


def between(work: Sequence[str]) -> str:
  """What runs during a transfer, in few words."""
  shown = ', '.join(work[:2])
  return f'{shown}, and {len(work) - 2} more' if len(work) > 2 else shown


def _temporaries(plan: Plan) -> Iterator[str]:
  yield f'largest temporaries ({plan.temporaries_from}):'
  for buffer in plan.temporaries:
    part = 'backward' if 'transpose(' in buffer.source else 'forward'
    if 'rematted' in buffer.source:
      part = 'again'
    if '/' not in buffer.source:
      part = ''
    count = f'{buffer.count} x ' if buffer.count > 1 else ''
    where = ' '.join(
      word for word in (part, last_name(buffer.source), buffer.line) if word
    )
    yield f'  {size(buffer.bytes):>9}  {count}{buffer.shape}  {where}'


def _footing(plan: Plan) -> Iterator[str]:
  spent = ', '.join(f'{name} {s:.0f} s' for name, s in plan.seconds.items())
  yield (
    f'assumed: {plan.utilization:.0%} of the peak, '
    f'{size(plan.link_bandwidth)}/s over one link; nothing was run (planned in '
    f'{spent})'
  )
