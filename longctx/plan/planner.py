"""Planner: cost of a training step, from its program and from formulas."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax

from longctx.costs import memory, overlap
from longctx.costs.chips import Chip
from longctx.costs.hlo import collective_bytes
from longctx.plan import hops
from longctx.plan.program import (
  ASSIGNMENT,
  LIVE_RANGE,
  Program,
  Step,
  compile_step,
  trace,
)
from longctx.plan.topologies import describe, find_chip, longest_hop
from longctx.training.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Memory:
  """Memory of one device in bytes, by part.

  Attributes:
    parameters: of which the device holds its shards, like the next two.
    batch: tokens, labels, weights.
    padding: what arguments take beyond their numbers.
    outputs: results that do not take the place of arguments.
    temporaries: between arguments and results, at most at one time.
    limit: what a program may have.
  """

  parameters: int
  optimizer: int
  batch: int
  padding: int
  outputs: int
  temporaries: int
  code: int
  limit: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self)) - self.limit

  @property
  def fits(self) -> bool:
    return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """FLOPs of one step.

  Attributes:
    formula: three forward passes on allowed pairs, as training announces.
    busiest: of the device that computes most: blocks that are computed,
      backward passes, and forward passes that are repeated.
    again: whether attention's forward pass is repeated in the backward pass.
  """

  formula: float
  busiest: float
  again: bool


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Step time in seconds, by formula: nothing was run.

  Attributes:
    compute: the busiest device's FLOPs at the assumed utilization.
    exposed: transfers during which nothing runs, and what of a ring's takes
      longer than a hop's blocks.
  """

  compute: float
  exposed: float

  @property
  def step(self) -> float:
    return self.compute + self.exposed


@dataclasses.dataclass(frozen=True)
class Plan:
  """Plan of a training step: memory, FLOPs, traffic and time on a machine.

  Attributes:
    parameters: numbers, of the whole model.
    hop_links: links that a hop of the ring crosses, at most; None where the
      devices have no coordinates.
    utilization: that is assumed.
    link_bandwidth: bytes per second, likewise.
    refusal: the compiler's, where the program does not fit.
    wire_bytes: by kind, all devices together.
    collectives: in groups that are alike.
    temporaries: the largest.
    temporaries_from: how they were found.
    seconds: that planning took, by part.
  """

  topology: str
  kind: str
  mesh: dict[str, int]
  scheme: str
  layout: str
  remat: str
  seq_len: int
  batch_size: int
  parameters: int
  hop_links: int | None
  utilization: float
  link_bandwidth: float
  memory: Memory
  refusal: str
  work: StepFlops
  wire_bytes: dict[str, int]
  collectives: list[overlap.Group]
  attention: list[hops.Attended]
  estimate: Estimate
  temporaries: list[memory.Buffer]
  temporaries_from: str
  seconds: dict[str, float]

  @property
  def fits(self) -> bool:
    return not self.refusal and self.memory.fits

  @property
  def devices(self) -> int:
    return math.prod(self.mesh.values())


def make_plan(
  config: ExperimentConfig,
  topology: str,
  *,
  utilization: float = hops.UTILIZATION,
) -> Plan:
  """Compiles a training step for a topology and reads what it costs.

  Args:
    topology: as in 'v5p:4x4x8'.
    utilization: share of the peak that is assumed for all products.

  Raises:
    ValueError, NotImplementedError: with one line to read.
  """
  if not 0 < utilization <= 1:
    raise ValueError(f'{utilization=} must be above 0 and at most 1')
  chip = find_chip(topology)
  begun = time.perf_counter()
  step = trace(config, topology, describe(topology), chip)
  traced = time.perf_counter()
  program = compile_step(step)
  compiled = time.perf_counter()
  found = overlap.transfers(program.text)
  attention = hops.attended(step, chip, utilization)
  work = _work(step, attention)
  temporaries, how = memory.largest(
    program.text, program.dump[ASSIGNMENT], program.dump[LIVE_RANGE]
  )
  mesh = step.placement.mesh
  return Plan(
    topology,
    chip.kind,
    dict(mesh.shape),
    step.placement.scheme,
    step.placement.layout.name,
    step.model.remat,
    step.task.seq_len,
    config.batch_size,
    sum(x.size for x in jax.tree.leaves(step.state['params'])),
    longest_hop(mesh.devices, wraps=chip.wraps, axis=1),
    utilization,
    chip.link_bandwidth,
    _memory(step, program, chip),
    program.refusal,
    work,
    collective_bytes(program.text),
    overlap.grouped(found),
    attention,
    _estimate(work, attention, found, step, chip, utilization),
    temporaries,
    how,
    {
      'trace': traced - begun,
      'compile': compiled - traced,
      'read': time.perf_counter() - compiled,
    },
  )


def _memory(step: Step, program: Program, chip: Chip) -> Memory:
  parts = {
    'parameters': shard_bytes(step.state['params']),
    'optimizer': shard_bytes(step.state['opt']),
    'batch': shard_bytes(step.batch),
  }
  padding = max(0, program.argument_bytes - sum(parts.values()))
  return Memory(
    **parts,
    padding=padding,
    outputs=program.output_bytes,
    temporaries=program.temporary_bytes,
    code=program.code_bytes,
    limit=chip.usable_bytes,
  )


def shard_bytes(tree: Any) -> int:
  """Bytes of the shards of arrays that one device holds."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _work(
  step: Step,
  attention: Sequence[hops.Attended],
) -> StepFlops:
  T, rows = step.task.seq_len, step.config.batch_size
  forward = rows * step.module.flops(T)
  mixing = sum(
    block.attention.mixing_flops(T)
    for block, layer in zip(step.module.blocks, step.model.layers, strict=True)
    if any(kind.layer == layer and not kind.reason for kind in attention)
  )
  dense = (forward - rows * mixing) / step.placement.mesh.size
  # Other policies keep what attention gives.
  again = step.model.remat == 'full'
  blocks = sum(
    kind.count * (kind.forward_flops * (1 + again) + kind.backward_flops)
    for kind in attention
  )
  repeats = 4 if step.model.remat == 'full' else 3
  return StepFlops(3.0 * forward, repeats * dense + blocks, again)


def _estimate(
  work: StepFlops,
  attention: Sequence[hops.Attended],
  found: Sequence[overlap.Transfer],
  step: Step,
  chip: Chip,
  utilization: float,
) -> Estimate:
  devices = step.placement.mesh.size
  exposed = 0.0
  for transfer in found:
    if not transfer.overlapped:
      sent = transfer.wire_bytes / devices * (transfer.times or 1)
      exposed += sent / chip.link_bandwidth
  for kind in attention:
    for ring in kind.rings:
      passes = [*[ring.forward] * (1 + work.again), ring.backward]
      times = kind.count * step.config.optimizer.accumulation
      exposed += times * sum(
        one.hops * max(0.0, one.transfer_seconds - one.compute_seconds)
        for one in passes
      )
  return Estimate(work.busiest / (chip.flops * utilization), exposed)
