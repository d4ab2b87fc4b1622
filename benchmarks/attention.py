"""Time, useful FLOP/s and peak memory of attention, beside PyTorch's.

    python benchmarks/attention.py
    python benchmarks/attention.py --lengths=8192 --variants=causal
    python benchmarks/attention.py --quick

Prints JSON lines. Per implementation, variant, pass and length T:

    seconds, seconds_min   median and least of `--repeats` calls; the
                           implementations take turns in one process, so that a
                           busy machine slows all of them alike
    useful_gflops_per_s    FLOPs on allowed pairs alone, at the median; forward
                           + backward counts 3.5 forward passes (7 products of
                           which the forward has 2), linear attention 3
    peak_bytes             peak resident memory of one call, inputs and outputs
                           included, measured in a process of its own after
                           compilation: VmHWM less VmRSS before the inputs are
                           made, where /proc has them, else null

then, per variant and pass, `torch_seconds_ratio`, PyTorch's time over the
implementation's (above 1: faster than PyTorch), and `doubling`, time(2T) over
time(T), which is 2 where the cost is linear in T. It divides least times:
interruptions only ever add, and lengths are not measured in turns.

PyTorch's `scaled_dot_product_attention` is measured when torch is installed,
on the causal variant: it has no window.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from longctx.masks import Causal, SlidingWindow
from longctx.ops.dot_product_attention import (
  IMPLEMENTATIONS,
  dot_product_attention,
)
from longctx.ops.recurrence import linear_attention
from longctx.ops.target import target

try:
  import torch
except ImportError:
  torch = None

PASSES = ('forward', 'forward+backward')
VARIANTS = ('causal', 'window', 'linear')

# The reference holds every score: more than a few GB beyond this length.
REFERENCE_MOST = 4096


def parse_arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  integers = functools.partial(_split, of=int)
  parser.add_argument('--lengths', type=integers, default=[4096, 8192, 16384])
  parser.add_argument('--variants', type=_split, default=list(VARIANTS))
  parser.add_argument('--passes', type=_split, default=list(PASSES))
  parser.add_argument('--implementations', type=_split, default=None)
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--kv_heads', type=int, default=None)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--window', type=int, default=256, help='keys, own too')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--memory', type=int, default=1, help='0: do not measure')
  parser.add_argument('--quick', action='store_true', help='seconds, T <= 1024')
  # One case, for its memory alone: what the subprocesses are started with.
  parser.add_argument('--only_memory', default=None, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.quick:
    args.lengths, args.repeats = [512, 1024], 2
  args.kv_heads = args.kv_heads or args.heads
  for name, known in (('variants', VARIANTS), ('passes', PASSES)):
    if unknown := set(getattr(args, name)) - set(known):
      parser.error(f'unknown {name}: {sorted(unknown)}; known: {known}')
  return args


def _split(text, of=str):
  return [of(part) for part in text.split(',')]


def implementations(args, variant, T):
  """Names of what can run a variant at length T."""
  names = ['xla'] if variant == 'linear' else list(IMPLEMENTATIONS)
  # An interpreter's time says nothing of a kernel, and cuDNN has no float32.
  elsewhere = {'cudnn'} | ({'pallas'} if target().platform != 'tpu' else set())
  names = [name for name in names if name not in elsewhere]
  if variant == 'causal' and torch is not None:
    names.append('torch')
  if T > REFERENCE_MOST and 'reference' in names:
    names.remove('reference')
  return [n for n in names if n in (args.implementations or names)]


def useful_flops(args, variant, pass_, T):
  """FLOPs that the result is worth, over batch rows and heads."""
  rows = args.batch * args.heads
  if variant == 'linear':
    # k vᵀ into the state and q times the state; twice as much backward.
    forward = 4 * T * args.head_dim**2
    return rows * forward * (1 if pass_ == 'forward' else 3)
  forward = _mask(args, variant).useful_flops(T, T, args.head_dim)
  return rows * forward * (1 if pass_ == 'forward' else 3.5)


def _mask(args, variant):
  return Causal() if variant == 'causal' else SlidingWindow(args.window - 1)


def make_arrays(args, T):
  """q, k, v and the cotangent of out, as float32 numpy arrays."""
  rng = np.random.default_rng(0)
  heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
  return [
    rng.standard_normal((args.batch, T, n, args.head_dim), np.float32)
    for n in heads
  ]


def prepare(name, args, variant, pass_, T):
  """Compiles a case; returns a function of arrays that gives its call."""
  if name == 'torch':
    return functools.partial(_prepare_torch, args, pass_)
  if variant == 'linear':

    def attend(q, k, v):
      return linear_attention(q, k, v)[0]
  else:
    attend = functools.partial(
      dot_product_attention, mask=_mask(args, variant), implementation=name
    )

  def both(q, k, v, out_bar):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, vjp(out_bar)

  function = both
  if pass_ == 'forward':
    function = lambda q, k, v, out_bar: attend(q, k, v)
  shapes = [
    jax.ShapeDtypeStruct((args.batch, T, n, args.head_dim), args.dtype)
    for n in (args.heads, args.kv_heads, args.kv_heads, args.heads)
  ]
  compiled = jax.jit(function).lower(*shapes).compile()

  def bind(arrays):
    arrays = [jnp.asarray(x, args.dtype) for x in arrays]
    return lambda: jax.block_until_ready(compiled(*arrays))

  return bind


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


def measure_memory(args, name, variant, pass_, T):
  """Peak bytes of a case, from a process of its own; None where unknown."""
  case = json.dumps([name, variant, pass_, T])
  options = ('batch', 'heads', 'kv_heads', 'head_dim', 'window', 'dtype')
  command = [sys.executable, os.path.abspath(__file__), '--only_memory', case]
  command += [f'--{option}={getattr(args, option)}' for option in options]
  # The package may be on the path without being installed.
  env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, env=env
  )
  if done.returncode:
    print(done.stderr[-2000:], file=sys.stderr)
    return None
  return json.loads(done.stdout.splitlines()[-1])


def print_peak(args, name, variant, pass_, T):
  """The subprocess of `measure_memory`."""
  bind = prepare(name, args, variant, pass_, T)
  if name == 'torch':
    # Imported and warm before the baseline, as the compiler is for XLA.
    bind(make_arrays(args, 128))()
  try:
    with open('/proc/self/clear_refs', 'w') as file:
      file.write('5')
    before = _status('VmRSS')
    bind(make_arrays(args, T))()
    print(_status('VmHWM') - before)
  except OSError:
    print('null')


def _status(field):
  with open('/proc/self/status') as file:
    line = next(line for line in file if line.startswith(field))
  return int(line.split()[1]) * 1024


def run_case(args, variant, pass_, T):
  """Prints the lines of a case; returns least seconds by implementation."""
  names = implementations(args, variant, T)
  arrays = make_arrays(args, T)
  calls = {n: prepare(n, args, variant, pass_, T)(arrays) for n in names}
  seconds = time_in_turns(calls, args.repeats)
  del calls, arrays
  medians = {n: statistics.median(s) for n, s in seconds.items()}
  flops = useful_flops(args, variant, pass_, T)
  about = {'pass': pass_, 'variant': variant, 'T': T}
  for name in names:
    line = dict(implementation=name, **about)
    line |= dict(B=args.batch, N=args.heads, K=args.kv_heads, H=args.head_dim)
    if variant == 'window':
      line |= dict(window=args.window)
    line |= dict(
      dtype=args.dtype,
      seconds=round(medians[name], 6),
      seconds_min=round(min(seconds[name]), 6),
      useful_gflops_per_s=round(flops / medians[name] / 1e9, 1),
    )
    if args.memory:
      line |= dict(peak_bytes=measure_memory(args, name, variant, pass_, T))
    if 'torch' in medians and name != 'torch':
      ratio = medians['torch'] / medians[name]
      line |= dict(torch_seconds_ratio=round(ratio, 3))
    print(json.dumps(line), flush=True)
  return {n: min(s) for n, s in seconds.items()}


def main(argv=None):
  args = parse_arguments(argv)
  if args.only_memory:
    return print_peak(args, *json.loads(args.only_memory))
  for variant in args.variants:
    for pass_ in args.passes:
      least = {T: run_case(args, variant, pass_, T) for T in args.lengths}
      for T in sorted(set(least) & {t // 2 for t in least}):
        both = least[T].keys() & least[2 * T].keys()
        doubling = {
          n: round(least[2 * T][n] / least[T][n], 3) for n in sorted(both)
        }
        line = {'pass': pass_, 'variant': variant, 'T': T, 'doubling': doubling}
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
