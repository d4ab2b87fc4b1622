"""Cost of a run and of its steps, told before the first one has ended."""

from typing import Any

import jax

from longctx.costs.hlo import program_cost
from longctx.parallel import Placement
from longctx.training import metrics
from longctx.training.progress import LINES, matmul_rate, span
from longctx.training.runs import Run

# From this many on a step's time is told beforehand: seconds, on two CPU cores.
LONG_FLOPS = 1e11


def announce_run(run: Run, step: int, parameters: int):
  """Says where a run is, and what it is."""
  where = f'step {step} of {run.config.steps}' if step else 'new'
  task = run.task
  metrics.say(
    f'{run.name or "train"}: {where}, {parameters:,} parameters, task '
    f'{run.config.task["name"]} (chance {task.chance:.4f}, ceiling '
    f'{task.ceiling:.4f}), {_devices(run.placement)}, workdir {run.workdir}'
  )


def _devices(placement: Placement | None) -> str:
  kind = jax.devices()[0].device_kind
  if placement is None:
    return f'1 {kind} device'
  mesh, layout = placement.mesh, placement.layout
  shape = ' x '.join(f'{name} {n}' for name, n in mesh.shape.items())
  return (
    f'{mesh.size} {kind} devices ({shape}), {placement.scheme}, '
    f'{layout.name} layout'
  )


def expect(run: Run, flops: int) -> float:
  """Says how long a step takes at least, where it takes long: seconds."""
  if flops < LONG_FLOPS or not metrics.is_writer():
    return 0.0
  dtype = 'bfloat16' if run.config.model.dtype == 'bfloat16' else 'float32'
  rate = matmul_rate(dtype)
  # Virtual devices share what one of them has.
  if run.placement is not None and jax.default_backend() != 'cpu':
    rate *= run.placement.mesh.size
  seconds = flops / rate
  if seconds > LINES:
    tokens = run.config.batch_size * run.task.seq_len
    metrics.say(
      f'{run.name or "train"}: a step reads {tokens:,} tokens in an '
      f'estimated {span(seconds)}: {flops:.3g} FLOPs at {rate:.3g} a second, '
      'as fast as matrix products are here'
    )
  return seconds


def announce_program(run: Run, flops: int, compiled: Any):
  """Says what a compiled step computes, holds and sends."""
  cost = program_cost(compiled)
  wire = sum(cost.wire_bytes.values())
  kinds = ', '.join(
    f'{kind} {n / 1e6:,.1f}' for kind, n in cost.wire_bytes.items() if n
  )
  metrics.say(
    f'{run.name or "train"}: a step computes {flops:.3g} FLOPs (three forward '
    f'passes on allowed pairs), holds {cost.device_bytes / 1e6:,.0f} MB per '
    f'device and sends {wire / 1e6:,.1f} MB over all wires ({kinds})'
  )
