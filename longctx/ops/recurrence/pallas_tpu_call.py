"""Calls of a chunked recurrence's TPU kernels, and their derivatives.

The state of a head lies in VMEM while the grid walks over the chunks of C steps
of its sequence: forwards for the outputs, forwards again for the states that
enter the chunks, which the backward pass begins with, and then backwards for
the gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longctx.ops.recurrence import chunked
from longctx.ops.recurrence.pallas_tpu_kernels import (
  ScanKernel,
  backward_kernel,
  forward_kernel,
)
from longctx.ops.recurrence.pallas_tpu_layout import block_bytes, lanes
from longctx.ops.recurrence.steps import Results, SegmentIndex, State, Steps
from longctx.ops.tpu import VMEM_LIMIT
from longctx.typing import Array, Float, Int

# What a kernel may take of the VMEM without being given more: the limit is 16
# MiB on some chips, and part of it is the compiler's.
_FREE_VMEM = 10 * 2**20

_Gradients = tuple[State, Steps]
_Segments = Int[Array, 'B L 2 C'] | None
_States = Float[Array, 'B K G P V']


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_chunks(
  kernel: ScanKernel, state: State, steps: Steps, segment_index: SegmentIndex
) -> Results:
  """(out, last state) of a recurrence that `kernel` computes.

  The backward pass keeps the inputs only and computes the T/C states between
  chunks again (memory T P V / C per head while it runs). A second derivative
  is that of chunked.py. Any T works: the last chunk is padded with zeros, steps
  that must change nothing.

  Args:
    kernel: the recurrence.
    state: what enters the first chunk, float32.
    steps: one per token; log_decay is cut off at SMALLEST_LOG_DECAY.
    segment_index: how often the id of the row has changed so far.
  """
  return _forward(kernel, state, steps, segment_index)


def _scan_fwd(kernel: ScanKernel, *inputs: Any) -> tuple[Results, Any]:
  return _forward(kernel, *inputs), inputs


def _scan_bwd(
  kernel: ScanKernel, inputs: Any, dresults: Results
) -> tuple[State, Steps, None]:
  return *_backward(kernel, *inputs, *dresults), None


scan_chunks.defvjp(_scan_fwd, _scan_bwd)


def _differentiated_as(
  plain: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Gives a function of a kernel and arrays the derivative of `plain`."""

  def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
    run = jax.custom_jvp(run, nondiff_argnums=(0,))

    @run.defjvp
    def jvp(kernel, primals, tangents):
      _, change = jax.jvp(functools.partial(plain, kernel), primals, tangents)
      return run(kernel, *primals), change

    return run

  return decorate


def _plain_forward(
  kernel: ScanKernel, state: State, steps: Steps, segment_index: SegmentIndex
) -> Results:
  """`_forward` in arrays of the whole, which JAX can differentiate at will."""
  return chunked.recurrence(
    steps,
    state,
    segment_index,
    scale=kernel.scale,
    chunk_size=64,
    out_dtype=kernel.out_dtype,
    own_vjp=False,
  )


def _plain_backward(
  kernel: ScanKernel,
  state: State,
  steps: Steps,
  segment_index: SegmentIndex,
  *dresults: Array,
) -> _Gradients:
  forward = lambda *x: _plain_forward(kernel, *x, segment_index)
  return jax.vjp(forward, state, steps)[1](dresults)


@_differentiated_as(_plain_forward)
def _forward(
  kernel: ScanKernel, state: State, steps: Steps, segment_index: SegmentIndex
) -> Results:
  layout = kernel.layout
  out, last = _call_forward(
    kernel,
    layout.by_key_head(state),
    steps.map(layout.split),
    layout.split_segments(segment_index),
  )
  out = out.reshape(layout.B, layout.K * layout.G, -1, layout.V)
  return jnp.moveaxis(out, 1, 2)[:, : layout.T], last.reshape(state.shape)


@_differentiated_as(_plain_backward)
def _backward(
  kernel: ScanKernel,
  state: State,
  steps: Steps,
  segment_index: SegmentIndex,
  dout: Float[Array, 'B T N V'],
  dlast: State,
) -> _Gradients:
  """The gradients of `state` and of `steps`."""
  layout = kernel.layout
  operands, join = jax.vjp(lambda steps: steps.map(layout.split), steps)
  segments = layout.split_segments(segment_index)
  states = _call_forward(
    kernel, layout.by_key_head(state), operands, segments, with_states=True
  )
  dfirst, doperands = _call_backward(
    kernel,
    states,
    operands,
    segments,
    layout.split('q', dout),
    layout.by_key_head(dlast),
  )
  return dfirst.reshape(state.shape), *join(doperands)


def _call_forward(
  kernel: ScanKernel,
  state: _States,
  steps: Steps,
  segments: _Segments,
  *,
  with_states: bool = False,
) -> Any:
  """(out, last state), or the states that enter the chunks."""
  *shape, C, P = steps.q.shape
  V = state.shape[-1]
  out = jax.ShapeDtypeStruct((*shape, C, V), kernel.out_dtype)
  if with_states:
    out = jax.ShapeDtypeStruct((*shape, P, V), state.dtype)
  out, last = _call(
    functools.partial(forward_kernel, kernel, with_states),
    kernel,
    (state, steps, segments),
    (out, jax.ShapeDtypeStruct(state.shape, state.dtype)),
    name='states' if with_states else 'forward',
    passes=1,
  )
  return out if with_states else (out, last)


def _call_backward(
  kernel: ScanKernel,
  states: Float[Array, 'B K G L P V'],
  steps: Steps,
  segments: _Segments,
  dout: Float[Array, 'B K G L C V'],
  dlast: _States,
) -> tuple[_States, Steps]:
  """The gradients of the first state and of the steps."""
  layout = kernel.layout
  sums = []
  if layout.query_heads < layout.G:
    # Over the query heads that share a key head: of keys, and of values.
    sums = [
      pltpu.VMEM((1, layout.chunk, width), jnp.float32)
      for width in (layout.P, layout.V)
    ]
  return _call(
    functools.partial(backward_kernel, kernel),
    kernel,
    (states, steps, segments, dout, dlast),
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (dlast, steps)
    ),
    name='gradients',
    passes=3,
    reverse=True,
    scratch=sums,
  )


def _call(
  body: Callable[..., None],
  kernel: ScanKernel,
  inputs: tuple[Any, ...],
  outputs: tuple[Any, ...],
  *,
  name: str,
  passes: int,
  reverse: bool = False,
  scratch: Sequence[Any] = (),
) -> tuple[Any, ...]:
  """pallas_call of body(*inputs, *outputs, *scratch), trees of references.

  Args:
    body: of the kernel.
    kernel: the recurrence.
    inputs: trees of arrays.
    outputs: trees of shapes.
    name: of what it computes.
    passes: how many times the products of the forward pass it computes.
    reverse: whether the last chunk comes first.
    scratch: what the kernel keeps for itself.
  """
  layout = kernel.layout
  block = functools.partial(layout.block, reverse=reverse)
  in_specs, out_specs = jax.tree.map(block, (inputs, outputs))
  blocks = jax.tree.leaves((in_specs, out_specs))
  arrays = jax.tree.leaves((inputs, outputs))
  heads = layout.key_heads * layout.query_heads
  vmem = 2 * sum(map(block_bytes, blocks, arrays))
  # What a head holds besides its blocks, in matrices of C columns.
  vmem += 4 * heads * passes * 24 * layout.chunk * lanes(layout.chunk)
  calls = layout.B * layout.K * layout.G * layout.chunks
  return pl.pallas_call(
    body,
    grid=layout.grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=outputs,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=None if vmem <= _FREE_VMEM else VMEM_LIMIT,
    ),
    cost_estimate=pl.CostEstimate(
      flops=passes * calls * kernel.flops,
      transcendentals=calls * kernel.exponentials,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    ),
    interpret=kernel.interpret,
    name=f'{kernel.name}_{name}',
  )(*inputs)
