"""Attention on virtual devices that share the cores, beside PyTorch's.

    python benchmarks/ring.py
    python benchmarks/ring.py --schemes=ring --layouts=zigzag,striped
    python benchmarks/ring.py --quick

Prints JSON lines. Per scheme and layout, and beside them for `one_device` (the
same attention without a mesh), `torch` (its `scaled_dot_product_attention`, a
flash attention, when torch is installed), `ringattention` (the reference JAX
implementation of arXiv:2310.01889 on the same devices, after `pip install
einops` and `pip install --no-deps ringattention`) and `dense` (the equation,
every score held, as long as that takes at most 8 GB), all on the same causal
sequence, forward and forward + backward:

    seconds, seconds_min   median and least of `--repeats` calls; all take turns
                           in one process, so that a busy machine slows all of
                           them alike
    useful_gflops_per_s    FLOPs on allowed pairs alone, of all devices, at the
                           median; forward + backward counts 3.5 forward passes
                           (7 products of which the forward has 2)
    torch_seconds_ratio    PyTorch's time over this one's (above 1: faster)
    ringattention_seconds_ratio, dense_seconds_ratio
                           likewise
    temp_bytes             what the compiler sets aside on each device, beside
                           inputs and outputs

then, with `--memory=1`, per scheme, layout and number of devices, `peak_bytes`
of a device at the same tokens per device: inputs, outputs and what the compiler
sets aside. It does not grow with devices and tokens where memory is O(T / R).

Virtual devices show what a schedule costs, not how devices overlap: all of them
share the cores of one machine, and what is sent is a copy in memory.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import parallel
from longctx.masks import Causal
from longctx.ops.dot_product_attention import dot_product_attention
from longctx.parallel.layout import LAYOUTS, SequenceLayout

try:
  import torch
except ImportError:
  torch = None

PASSES = ('forward', 'forward+backward')
OTHERS = ('one_device', 'dense', 'torch', 'ringattention')

# Queries and keys per chunk of the reference: as long as our blocks.
CHUNK = 512

# Bytes for every score, beyond which the dense softmax is left out: forward +
# backward at 8192 tokens and 8 heads takes 12 GB.
DENSE_MOST = 8 * 2**30


def parse_arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  split = functools.partial(str.split, sep=',')
  parser.add_argument('--length', type=int, default=8192)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--schemes', type=split, default=list(parallel.SCHEMES))
  parser.add_argument('--layouts', type=split, default=list(LAYOUTS))
  parser.add_argument('--passes', type=split, default=list(PASSES))
  parser.add_argument('--others', type=split, default=list(OTHERS))
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--kv_heads', type=int, default=None)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--memory', type=int, default=1, help='0: do not measure')
  parser.add_argument('--quick', action='store_true', help='seconds, T = 512')
  args = parser.parse_args(argv)
  if args.quick:
    args.length, args.repeats, args.devices = 512, 2, 4
    args.schemes, args.layouts = ['ring', 'ulysses'], ['zigzag']
  args.kv_heads = args.kv_heads or args.heads
  for name, known in (
    ('schemes', parallel.SCHEMES),
    ('layouts', LAYOUTS),
    ('passes', PASSES),
    ('others', OTHERS),
  ):
    if unknown := set(getattr(args, name)) - {*known, ''}:
      parser.error(f'unknown {name}: {sorted(unknown)}; known: {known}')
  return args


def make_arrays(args):
  """q, k, v and the cotangent of out, in natural order."""
  rng = np.random.default_rng(0)
  return [
    rng.standard_normal((args.batch, args.length, n, args.head_dim), np.float32)
    for n in (args.heads, args.kv_heads, args.kv_heads, args.heads)
  ]


def place(args, scheme, devices):
  """(mesh, axis) of a scheme."""
  if scheme == 'ring+ulysses':
    return parallel.make_mesh(seq=devices // 2, model=2), ('seq', 'model')
  return parallel.make_mesh(seq=devices), 'seq'


def with_backward(attend, pass_):
  """The function of q, k, v and the cotangent of out that a pass computes."""

  def both(q, k, v, out_bar):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, vjp(out_bar)

  if pass_ == 'forward':
    return lambda q, k, v, out_bar: attend(q, k, v)
  return both


def compile_scheme(args, scheme, name, pass_, devices, length):
  """(program, layout, sharding) of a scheme."""
  mesh, axis = place(args, scheme, devices)
  layout = SequenceLayout(name, length, devices)
  attend = functools.partial(
    parallel.dot_product_attention,
    mesh=mesh,
    axis=axis,
    scheme=scheme,
    layout=layout,
    in_layout=True,
  )
  sharding = NamedSharding(mesh, P(None, axis))
  shapes = [
    jax.ShapeDtypeStruct(
      (args.batch, layout.padded_len, n, args.head_dim),
      args.dtype,
      sharding=sharding,
    )
    for n in (args.heads, args.kv_heads, args.kv_heads, args.heads)
  ]
  program = jax.jit(with_backward(attend, pass_)).lower(*shapes).compile()
  return program, layout, sharding


def prepare(args, scheme, name, pass_, arrays):
  """(call, temp_bytes) of a scheme and layout."""
  program, layout, sharding = compile_scheme(
    args, scheme, name, pass_, args.devices, args.length
  )
  arrays = [
    jax.device_put(layout.apply(x).astype(args.dtype), sharding) for x in arrays
  ]
  call = lambda: jax.block_until_ready(program(*arrays))
  return call, program.memory_analysis().temp_size_in_bytes


def prepare_other(args, name, pass_, arrays):
  """(call, temp_bytes) of what there is to compare with."""
  if name == 'torch':
    return _prepare_torch(args, pass_, arrays), None
  if name == 'ringattention':
    return _prepare_ringattention(args, pass_, arrays)
  implementation = 'reference' if name == 'dense' else None
  attend = functools.partial(
    dot_product_attention, implementation=implementation
  )
  arrays = [jnp.asarray(x, args.dtype) for x in arrays]
  program = jax.jit(with_backward(attend, pass_)).lower(*arrays).compile()
  call = lambda: jax.block_until_ready(program(*arrays))
  return call, program.memory_analysis().temp_size_in_bytes


def _prepare_torch(args, pass_, arrays):
  # PyTorch's own layout, so that it does not pay for a transpose.
  q, k, v, out_bar = (
    torch.tensor(x, dtype=getattr(torch, args.dtype))
    .transpose(1, 2)
    .contiguous()
    for x in arrays
  )
  attend = functools.partial(
    torch.nn.functional.scaled_dot_product_attention,
    is_causal=True,
    enable_gqa=args.kv_heads != args.heads,
  )
  if pass_ == 'forward':
    return torch.no_grad()(lambda: attend(q, k, v))
  inputs = [x.requires_grad_() for x in (q, k, v)]
  return lambda: torch.autograd.grad(attend(*inputs), inputs, out_bar)


def _load_ringattention():
  """The reference's module, or None where it is not installed.

  Importing its package fails, since it asks for `jax.lib.xla_bridge`.
  """
  spec = importlib.util.find_spec('ringattention')
  if spec is None or importlib.util.find_spec('einops') is None:
    return None
  path = pathlib.Path(spec.origin).with_name('ringattention_jax.py')
  spec = importlib.util.spec_from_file_location('ringattention_jax', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _prepare_ringattention(args, pass_, arrays):
  mesh = parallel.make_mesh(seq=args.devices)
  chunk = min(CHUNK, args.length // args.devices)
  options = dict(
    causal_block_size=1,
    query_chunk_size=chunk,
    key_chunk_size=chunk,
    deterministic=True,
    dropout_rng=None,
    attn_pdrop=0.0,
    dtype=jnp.float32,
    policy=jax.checkpoint_policies.nothing_saveable,
    precision=None,
    prevent_cse=False,
  )
  ring_attention = _load_ringattention().ring_attention

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=P(None, 'seq'),
    out_specs=P(None, 'seq'),
    check_vma=False,
  )
  def attend(q, k, v):
    return ring_attention(q, k, v, None, None, None, 'seq', True, options)

  sharding = NamedSharding(mesh, P(None, 'seq'))
  arrays = [jax.device_put(x.astype(args.dtype), sharding) for x in arrays]
  program = jax.jit(with_backward(attend, pass_)).lower(*arrays).compile()
  call = lambda: jax.block_until_ready(program(*arrays))
  return call, program.memory_analysis().temp_size_in_bytes


def _is_there(args, name):
  """Whether there is such a thing to compare with here."""
  if name == 'torch':
    return torch is not None
  if name == 'ringattention':
    # It has as many key heads as query heads.
    return args.kv_heads == args.heads and _load_ringattention() is not None
  return bool(name)


def time_in_turns(calls, repeats):
  """Seconds per call, {name: [repeats]}, after one call of each to warm up."""
  seconds = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(repeats):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def run_pass(args, pass_):
  """Prints the lines of a pass."""
  arrays = make_arrays(args)
  prepared = {
    (scheme, name): prepare(args, scheme, name, pass_, arrays)
    for scheme in args.schemes
    for name in args.layouts
    if scheme and name
  }
  for other in args.others:
    if _is_there(args, other):
      case = prepare_other(args, other, pass_, arrays)
      if other != 'dense' or case[1] <= DENSE_MOST:
        prepared[other, None] = case
  calls = {case: call for case, (call, _) in prepared.items()}
  seconds = time_in_turns(calls, args.repeats)
  medians = {case: statistics.median(s) for case, s in seconds.items()}
  flops = Causal().useful_flops(args.length, args.length, args.head_dim)
  flops *= args.batch * args.heads * (1 if pass_ == 'forward' else 3.5)
  for (scheme, name), (_, temp_bytes) in prepared.items():
    median = medians[scheme, name]
    line = {'scheme': scheme, 'layout': name, 'pass': pass_, 'T': args.length}
    line |= dict(B=args.batch, N=args.heads, K=args.kv_heads, H=args.head_dim)
    line |= dict(
      devices=args.devices if name or scheme == 'ringattention' else 1,
      dtype=args.dtype,
      seconds=round(median, 6),
      seconds_min=round(min(seconds[scheme, name]), 6),
      useful_gflops_per_s=round(flops / median / 1e9, 1),
    )
    for other in ('torch', 'ringattention', 'dense'):
      if (other, None) in medians and other != scheme:
        ratio = medians[other, None] / median
        line[f'{other}_seconds_ratio'] = round(ratio, 3)
    line |= dict(temp_bytes=temp_bytes)
    print(json.dumps(line), flush=True)


def print_memory(args):
  """Prints the bytes of a device as tokens and devices grow together."""
  L = args.length // args.devices
  for scheme in filter(None, args.schemes):
    for name in filter(None, args.layouts):
      devices = 2
      while devices <= args.devices:
        program, layout, _ = compile_scheme(
          args, scheme, name, PASSES[1], devices, L * devices
        )
        memory = program.memory_analysis()
        peak = (
          memory.argument_size_in_bytes
          + memory.output_size_in_bytes
          + memory.temp_size_in_bytes
        )
        line = dict(scheme=scheme, layout=name, devices=devices)
        line |= dict(T=layout.seq_len, peak_bytes=peak)
        print(json.dumps(line), flush=True)
        devices *= 2


def main(argv=None):
  args = parse_arguments(argv)
  parallel.ensure_devices(args.devices)
  for pass_ in args.passes:
    run_pass(args, pass_)
  if args.memory:
    print_memory(args)


if __name__ == '__main__':
  main()
