"""Recurrences with a matrix state, in chunks, as Pallas kernels for TPUs.

The state of a head lies in VMEM while the grid walks over the chunks of C steps
of its sequence: forwards for the outputs, forwards again for the states that
enter the chunks, which the backward pass begins with, and then backwards for
the gradients. What a chunk computes is one function of its state and inputs, as
in `chunks.scan_chunks`; the kernel of the gradients calls its VJP.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longctx.ops import tpu
from longctx.ops.recurrence.chunks import SMALLEST_LOG_DECAY
from longctx.ops.recurrence.products_tpu import SegmentRows
from longctx.ops.target import target
from longctx.ops.tpu import VMEM_LIMIT
from longctx.typing import Array, Float, Int

# Arrays with one head per key head; all others have one per query head.
_KEY_HEADS = ('k', 'v')
# A tile of bfloat16 has this many rows.
_SMALLEST_CHUNK = 16
_LARGEST_WIDTH = 512
_MIB = 1 << 20
# What a kernel may take of the VMEM without being given more: the limit is 16
# MiB on some chips, and part of it is the compiler's.
_FREE_VMEM = 10 * _MIB
# Of the states that a forward step holds; a backward step has more of them.
_MOST_STATES = 8 * _MIB


@dataclasses.dataclass(frozen=True)
class ChunkBlocks:
  """What one step of the grid computes.

  Attributes:
    chunk: C, the steps of the sequence, a power of two.
    key_heads: of as many key heads.
    query_heads: and of as many query heads of each; several key heads only if
      these are all.
  """

  chunk: int
  key_heads: int = 1
  query_heads: int = 1

  @classmethod
  def choose(
    cls, *, T: int, K: int, G: int, P: int, V: int, chunk: int, heads: int
  ) -> 'ChunkBlocks':
    """At most `chunk` steps and `heads` heads, as far as there are as many.

    Heads do not depend on each other, so the matrix unit is busy with one while
    another waits for its last product. Wide states leave room for few.

    Args:
      T: steps of the sequence.
      K: key heads.
      G: query heads of each.
      P: width of keys.
      V: width of values.
      chunk: the most steps, a power of two.
      heads: the most query heads.
    """
    heads = min(heads, max(1, _MOST_STATES // _state_bytes(P, V)))
    chunk = min(chunk, max(_SMALLEST_CHUNK, 1 << (T - 1).bit_length()))
    query_heads = _largest_divisor(G, heads)
    key_heads = _largest_divisor(K, heads // G) if query_heads == G else 1
    return cls(chunk, key_heads, query_heads)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A recurrence, and how it is computed.

  Attributes:
    name: of the recurrence, as profiles show it.
    chunk: chunk(state [P, V], inputs, segments) -> (out [C, V], next state) of
      one head, a function of its arguments alone that runs in a kernel. Inputs
      are by name: matrices [C, ...], and rows [1, C] of what is one number per
      step. All are float32.
    plain: plain(state, inputs, segment_index) -> (out, state), the same in
      arrays of the whole, which JAX can differentiate as often as it likes.
    sizes: of the blocks.
    flops, exponentials: of one chunk of one head.
    out_dtype: of the output.
    interpret: whether the kernel is run by XLA operations, for its values.
  """

  name: str
  chunk: Callable[[Array, Mapping[str, Array], Any], tuple[Array, Array]]
  plain: Callable[[Array, Mapping[str, Array], Any], tuple[Array, Array]]
  sizes: ChunkBlocks
  flops: int
  exponentials: int
  out_dtype: jax.typing.DTypeLike
  interpret: bool


def unsupported_reason(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
) -> str | None:
  """Why the kernels do not take a call, and what to take; None if they do."""
  if reason := tpu.unsupported_reason(target()):
    return f"{reason}: take 'xla' or None"
  for name, x in dict(q=q, k=k, v=v).items():
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      return (
        f'{name} is {x.dtype}, and its kernels take float32 and bfloat16: '
        "take 'xla' or None"
      )
  G = q.shape[2] // k.shape[2]
  P, V = q.shape[-1], v.shape[-1]
  if max(P, V) > _LARGEST_WIDTH:
    return (
      f'{P=} and {V=} must be at most {_LARGEST_WIDTH}, or a state does not '
      "fit into VMEM: take 'xla' or None"
    )
  size = G * _state_bytes(P, V)
  if size > VMEM_LIMIT // 2:
    return (
      f'the states {P=} x {V=} of {G} query heads that share a key head take '
      f'{size // _MIB} MiB of VMEM, more than {VMEM_LIMIT // 2 // _MIB}: '
      "take 'xla' or None"
    )
  return None


def scan_chunks(
  kernel: Kernel,
  state: Float[Array, 'B N P V'],
  inputs: Mapping[str, Array],
  segment_index: Int[Array, 'B T'] | None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """(out, last state) of a recurrence that `kernel` computes.

  The backward pass keeps the inputs only and computes the T/C states between
  chunks again (memory T P V / C per head while it runs). A second derivative
  is that of `kernel.plain`. Any T works: the last chunk is padded with zeros,
  steps that must change nothing.

  Args:
    kernel: the recurrence.
    state: what enters the first chunk, float32.
    inputs: arrays [B, T, heads, ...] by name, 'k' and 'v' with K heads and all
      others with N. log_decay is cut off at SMALLEST_LOG_DECAY.
    segment_index: how often the id of the row has changed so far.
  """
  return _run(kernel, state, dict(inputs), segment_index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(kernel, state, inputs, segment_index):
  return _forward(kernel, state, inputs, segment_index)


def _run_fwd(kernel, state, inputs, segment_index):
  return _forward(kernel, state, inputs, segment_index), (
    state,
    inputs,
    segment_index,
  )


def _run_bwd(kernel, saved, dresults):
  return *_backward(kernel, *saved, *dresults), None


_run.defvjp(_run_fwd, _run_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(kernel, state, inputs, segment_index):
  shape = _Shape.of(kernel, inputs)
  operands = _split(shape, inputs)
  out, state = _call_forward(
    kernel,
    shape,
    shape.by_group(state),
    operands,
    _rows_of(shape, segment_index),
  )
  out = jnp.moveaxis(out.reshape(shape.B, shape.N, -1, shape.V), 1, 2)
  return out[:, : shape.T], state.reshape(shape.B, shape.N, shape.P, shape.V)


@_forward.defjvp
def _forward_jvp(kernel, primals, tangents):
  *primals, segment_index = primals
  plain = functools.partial(_plain, kernel, segment_index)
  _, change = jax.jvp(plain, primals, list(tangents[:-1]))
  return _forward(kernel, *primals, segment_index), change


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(kernel, state, inputs, segment_index, dout, dstate):
  """The gradients of `state` and of `inputs`."""
  shape = _Shape.of(kernel, inputs)
  operands, join = jax.vjp(functools.partial(_split, shape), inputs)
  (dout,) = _split(shape, {'q': dout}).values()
  rows = _rows_of(shape, segment_index)
  states = _call_forward(
    kernel, shape, shape.by_group(state), operands, rows, states=True
  )
  dfirst, doperands = _call_backward(
    kernel, shape, states, operands, rows, dout, shape.by_group(dstate)
  )
  return dfirst.reshape(state.shape), *join(doperands)


@_backward.defjvp
def _backward_jvp(kernel, primals, tangents):
  def plain(state, inputs, *dresults):
    f = functools.partial(_plain, kernel, segment_index)
    return jax.vjp(f, state, inputs)[1](dresults)

  state, inputs, segment_index, *dresults = primals
  primals = [state, inputs, *dresults]
  tangents = [*tangents[:2], *tangents[3:]]
  _, change = jax.jvp(plain, primals, tangents)
  return _backward(kernel, state, inputs, segment_index, *dresults), change


def _plain(kernel, segment_index, state, inputs):
  out, state = kernel.plain(state, inputs, segment_index)
  return out.astype(kernel.out_dtype), state


@dataclasses.dataclass(frozen=True)
class _Shape:
  """Of a call: its sizes, and where a step of the grid finds its blocks.

  The grid is (B, K / key_heads, T / C, G / query_heads). Key heads and the
  states of all their query heads stay in VMEM while the last axis goes round.
  """

  sizes: ChunkBlocks
  B: int
  T: int
  K: int
  G: int
  P: int
  V: int

  @classmethod
  def of(cls, kernel, inputs):
    B, T, N, P = inputs['q'].shape
    K, V = inputs['v'].shape[2:]
    return cls(kernel.sizes, B, T, K, N // K, P, V)

  @property
  def N(self):
    return self.K * self.G

  @property
  def chunks(self):
    return pl.cdiv(self.T, self.sizes.chunk)

  @property
  def grid(self):
    sizes = self.sizes
    return (
      self.B,
      self.K // sizes.key_heads,
      self.chunks,
      self.G // sizes.query_heads,
    )

  def by_group(self, state):
    return state.reshape(self.B, self.K, self.G, self.P, self.V)

  def of_key(self, width, at):
    """Of an array [B, K, T, width]; at(c) is the chunk of step c."""
    sizes = self.sizes
    return pl.BlockSpec(
      (None, sizes.key_heads, sizes.chunk, width),
      lambda b, k, c, g: (b, k, at(c), 0),
    )

  def of_query(self, width, at):
    """Of an array [B, K, G, T, width]."""
    sizes = self.sizes
    return pl.BlockSpec(
      (None, sizes.key_heads, sizes.query_heads, sizes.chunk, width),
      lambda b, k, c, g: (b, k, g, at(c), 0),
    )

  def of_chunk(self, rows, width, at):
    """Of an array [B, K, G, T / C, rows, width]."""
    sizes = self.sizes
    return pl.BlockSpec(
      (None, sizes.key_heads, sizes.query_heads, None, rows, width),
      lambda b, k, c, g: (b, k, g, at(c), 0, 0),
    )

  def of_state(self):
    """Of an array [B, K, G, P, V]."""
    return pl.BlockSpec(
      (None, self.sizes.key_heads, self.G, self.P, self.V),
      lambda b, k, c, g: (b, k, 0, 0, 0),
    )

  def of_segments(self, at):
    """Of an array [B, T / C, 2, C]."""
    return pl.BlockSpec(
      (None, None, 2, self.sizes.chunk), lambda b, k, c, g: (b, at(c), 0, 0)
    )

  def of_operands(self, operands, at):
    specs = {}
    for name, x in operands.items():
      if x.ndim == 6:
        specs[name] = self.of_chunk(1, self.sizes.chunk, at)
      elif name in _KEY_HEADS:
        specs[name] = self.of_key(x.shape[-1], at)
      else:
        specs[name] = self.of_query(x.shape[-1], at)
    return specs


def _split(shape, inputs):
  """The inputs as the kernels read them; see the blocks of `_Shape`."""
  K, G, C = shape.K, shape.G, shape.sizes.chunk

  def split(name, x):
    if name == 'log_decay':
      x = jnp.maximum(x, SMALLEST_LOG_DECAY)
    pad = -shape.T % C
    if pad:
      x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x, 1, 2)
    if x.ndim == 3:
      # A row of one number per step, which is float32 at little cost.
      return x.astype(jnp.float32).reshape(shape.B, K, G, -1, 1, C)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      x = x.astype(jnp.float32)
    if name in _KEY_HEADS:
      return x
    return x.reshape(shape.B, K, G, *x.shape[2:])

  return {name: split(name, x) for name, x in inputs.items()}


def _rows_of(shape, segment_index):
  """[B, T / C, 2, C]: the segment of each step, and of the step before it."""
  if segment_index is None:
    return None
  segment_index = segment_index.astype(jnp.int32)
  pad = -shape.T % shape.sizes.chunk
  segment_index = jnp.pad(segment_index, [(0, 0), (0, pad)], mode='edge')
  previous = jnp.pad(segment_index[:, :-1], [(0, 0), (1, 0)])
  rows = jnp.stack([segment_index, previous], axis=1)
  rows = rows.reshape(shape.B, 2, shape.chunks, shape.sizes.chunk)
  return jnp.moveaxis(rows, 1, 2)


def _call_forward(kernel, shape, state, operands, segments, *, states=False):
  """(out, last state), or with `states` the states that enter the chunks."""
  at = lambda c: c
  if states:
    out = jax.ShapeDtypeStruct(
      (shape.B, shape.K, shape.G, shape.chunks, shape.P, shape.V), jnp.float32
    )
    out_spec = shape.of_chunk(shape.P, shape.V, at)
  else:
    q = operands['q']
    out = jax.ShapeDtypeStruct((*q.shape[:-1], shape.V), kernel.out_dtype)
    out_spec = shape.of_query(shape.V, at)
  result = _call(
    functools.partial(_forward_kernel, kernel, states),
    kernel,
    shape,
    (state, operands, segments),
    (
      shape.of_state(),
      shape.of_operands(operands, at),
      None if segments is None else shape.of_segments(at),
    ),
    (out, jax.ShapeDtypeStruct(state.shape, state.dtype)),
    (out_spec, shape.of_state()),
    name='states' if states else 'forward',
    passes=1,
  )
  return result[0] if states else result


def _forward_kernel(kernel, states, inputs, outputs, scratch):
  first, operands, segments = inputs
  out, carried = outputs

  @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
  def _():
    carried[...] = first[...]

  segments = _segments(segments)
  heads = _heads(kernel, carried)
  entering = [carried[k, n] for k, _, n in heads]
  if states:
    for (k, g, _), state in zip(heads, entering, strict=True):
      out[k, g] = state
  results = [
    kernel.chunk(state, _read(operands, k, g), segments)
    for (k, g, _), state in zip(heads, entering, strict=True)
  ]
  for (k, g, n), (values, state) in zip(heads, results, strict=True):
    carried[k, n] = state
    if not states:
      out[k, g] = values.astype(out.dtype)


def _call_backward(kernel, shape, states, operands, segments, dout, dstate):
  """The gradients of the first state and of the operands."""
  at = lambda c: shape.chunks - 1 - c
  as_outputs = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  operand_specs = shape.of_operands(operands, at)
  sizes = shape.sizes
  scratch = {}
  if sizes.query_heads < shape.G:
    # The sums over the query heads that share a key head.
    for name, width in dict(k=shape.P, v=shape.V).items():
      scratch[name] = pltpu.VMEM((1, sizes.chunk, width), jnp.float32)
  return _call(
    functools.partial(_backward_kernel, kernel),
    kernel,
    shape,
    (states, operands, segments, dout, dstate),
    (
      shape.of_chunk(shape.P, shape.V, at),
      operand_specs,
      None if segments is None else shape.of_segments(at),
      shape.of_query(shape.V, at),
      shape.of_state(),
    ),
    (as_outputs(dstate), jax.tree.map(as_outputs, operands)),
    (shape.of_state(), operand_specs),
    name='gradients',
    scratch=scratch,
    passes=3,
  )


def _backward_kernel(kernel, inputs, outputs, scratch):
  states, operands, segments, dout, dlast = inputs
  carried, doperands = outputs
  group_step = pl.program_id(3)

  @pl.when((pl.program_id(2) == 0) & (group_step == 0))
  def _():
    carried[...] = dlast[...]

  segments = _segments(segments)
  heads = _heads(kernel, carried)
  gradients = []
  for k, g, n in heads:
    _, vjp = jax.vjp(
      lambda state, inputs: kernel.chunk(state, inputs, segments),
      states[k, g],
      _read(operands, k, g),
    )
    gradients.append(vjp((dout[k, g].astype(jnp.float32), carried[k, n])))

  sums = {}
  for (k, g, n), (dstate, dinputs) in zip(heads, gradients, strict=True):
    carried[k, n] = dstate
    for name, x in dinputs.items():
      if name in _KEY_HEADS:
        sums[name, k] = sums[name, k] + x if (name, k) in sums else x
      else:
        doperands[name][k, g] = x.astype(doperands[name].dtype)
  for (name, k), x in sums.items():
    if scratch:
      total = scratch[name]

      @pl.when(group_step == 0)
      def _(total=total):
        total[...] = jnp.zeros(total.shape, total.dtype)

      total[k] += x
      x = total[k]
    # Overwritten until the last query heads have added theirs.
    doperands[name][k] = x.astype(doperands[name].dtype)


def _heads(kernel, carried):
  """(key head, query head in the block, query head in the state) of a step."""
  sizes = kernel.sizes
  first = 0
  if sizes.query_heads < carried.shape[1]:
    first = pl.program_id(3) * sizes.query_heads
  return [
    (k, g, first + g)
    for k in range(sizes.key_heads)
    for g in range(sizes.query_heads)
  ]


def _read(operands, k, g):
  return {
    name: (x[k] if name in _KEY_HEADS else x[k, g]).astype(jnp.float32)
    for name, x in operands.items()
  }


def _segments(rows):
  if rows is None:
    return None
  rows = rows[...]
  return SegmentRows(rows[:1], rows[1:])


def _call(
  body,
  kernel,
  shape,
  inputs,
  in_specs,
  outputs,
  out_specs,
  *,
  name,
  passes,
  scratch=(),
):
  """pallas_call of body(inputs, outputs, scratch), which are trees of refs.

  Args:
    passes: how many times the products of the forward pass it computes.
  """
  trees = [jax.tree.structure(x) for x in (inputs, outputs, scratch)]
  blocks = [*jax.tree.leaves(in_specs), *jax.tree.leaves(out_specs)]
  arrays = [*jax.tree.leaves(inputs), *jax.tree.leaves(outputs)]

  def unflatten(*refs):
    groups = []
    for tree in trees:
      groups.append(tree.unflatten(refs[: tree.num_leaves]))
      refs = refs[tree.num_leaves :]
    body(*groups)

  sizes = kernel.sizes
  calls = shape.B * shape.N * shape.chunks
  heads = sizes.key_heads * sizes.query_heads
  vmem = 2 * sum(map(_vmem_bytes, blocks, arrays))
  # What a head holds besides its blocks, in matrices of C columns.
  vmem += 4 * heads * passes * 24 * sizes.chunk * _lanes(sizes.chunk)
  results = pl.pallas_call(
    unflatten,
    grid=shape.grid,
    in_specs=jax.tree.leaves(in_specs),
    out_specs=jax.tree.leaves(out_specs),
    out_shape=jax.tree.leaves(outputs),
    scratch_shapes=jax.tree.leaves(scratch),
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
  )(*jax.tree.leaves(inputs))
  return jax.tree.unflatten(trees[1], results)


def _vmem_bytes(spec, x):
  *outer, rows, columns = (1 if n is None else n for n in spec.block_shape)
  size = _rows(rows) * _lanes(columns) * x.dtype.itemsize
  for n in outer:
    size *= n
  return size


def _state_bytes(P: int, V: int) -> int:
  """Of a head: what enters and what leaves, in float32, each of them twice."""
  return 16 * _rows(P) * _lanes(V)


def _rows(n):
  return pl.cdiv(n, 8) * 8


def _lanes(n):
  return pl.cdiv(n, 128) * 128


def _largest_divisor(n, most):
  return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)
