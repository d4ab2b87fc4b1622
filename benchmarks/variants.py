"""Time and memory of every variant as a layer, and how both grow with T.

    python benchmarks/variants.py
    python benchmarks/variants.py --variants=full,linear --lengths=2048,4096
    python benchmarks/variants.py --quick

Prints JSON lines. Per variant, pass and length T, a whole layer, projections
included, with its default arguments (or those of `--layers`, as in
`--layers="sliding_window(window=512);full"`; a variant that has no defaults is
measured only so):

    seconds, seconds_min   median and least of `--repeats` calls; the variants
                           take turns in one process, so that a busy machine
                           slows all of them alike
    peak_bytes             arguments, results and what the compiler sets aside
    hf_seconds_ratio       time of Hugging Face's LongformerSelfAttention, where
                           torch and transformers are installed, over this one's
                           (above 1: faster); its module ends before the
                           projection out, as ours does with `--out=0`

then, per variant and pass, `doubling`, time(2T) over time(T) of least times,
and `memory_doubling`; both are 2 where the cost is linear in T.

The process keeps memory that is freed, as train.py does; with `--keep=0` it has
what Python gives it, which slows PyTorch more than us.

Variants whose cost is quadratic stop at `--most_quadratic` tokens: those whose
mask allows more than a quarter of what full attention reads at the length.
"""

import argparse
import functools
import importlib.util
import inspect
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import parallel
from longctx.attention import VARIANTS, AttentionConfig, make_attention
from longctx.masks import Causal

PASSES = ('forward', 'forward+backward')
HUGGING_FACE = 'huggingface_longformer'


def has_defaults(variant):
  """Whether a layer can be made by the variant's name alone."""
  parameters = inspect.signature(variant.__init__).parameters
  own = set(parameters) - {'self', 'config', 'rngs'}
  return all(
    parameters[name].default is not inspect.Parameter.empty for name in own
  )


def parse_arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = functools.partial(str.split, sep=',')
  integers = lambda text: [int(part) for part in text.split(',')]
  parser.add_argument('--variants', type=names, default=None)
  parser.add_argument(
    '--layers', type=functools.partial(str.split, sep=';'), default=None
  )
  parser.add_argument(
    '--lengths', type=integers, default=[2**n for n in range(11, 17)]
  )
  parser.add_argument('--passes', type=names, default=list(PASSES))
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--d_model', type=int, default=512)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--window', type=int, default=512, help='of Longformer')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--most_quadratic', type=int, default=8192)
  parser.add_argument('--hf', type=int, default=1, help='0: leave it out')
  parser.add_argument('--out', type=int, default=1, help='0: no projection out')
  parser.add_argument(
    '--keep', type=int, default=1, help='0: give freed memory back'
  )
  parser.add_argument('--quick', action='store_true', help='seconds, T <= 256')
  args = parser.parse_args(argv)
  if args.quick:
    args.lengths, args.repeats, args.d_model, args.window = (
      [128, 256],
      2,
      32,
      32,
    )
  if not args.layers:
    names = sorted(
      n for n, variant in VARIANTS.items() if has_defaults(variant)
    )
    args.layers = args.variants or names
  return args


class Same(nnx.Module):
  """No projection."""

  def __call__(self, x):
    return x


def make_layer(args, layer):
  config = AttentionConfig(
    d_model=args.d_model,
    num_heads=args.heads,
    num_kv_heads=args.heads,
    head_dim=args.d_model // args.heads,
    value_dim=args.d_model // args.heads,
    position_encoding='none',
    dtype=args.dtype,
  )
  module = make_attention(layer, config, rngs=nnx.Rngs(0))
  if not args.out:
    module.out = Same()
  return module


def is_quadratic(module, T):
  """Whether it reads more than a quarter of the causal pairs at length T."""
  if module.mask is None or module.mask_is_bound:
    return False
  pairs = module.mask.num_allowed(T, T)
  return pairs > Causal().num_allowed(T, T) / 4


def prepare(args, module, pass_, T):
  """(call, peak_bytes) of a layer."""
  graph, params = nnx.split(module, nnx.Param)
  params = nnx.to_pure_dict(params)
  apply = lambda params, x: nnx.merge(graph, params)(x)

  def both(params, x, bar):
    out, vjp = jax.vjp(apply, params, x)
    return out, vjp(bar)

  forward = lambda params, x, bar: apply(params, x)
  x = np.random.default_rng(0).normal(size=(args.batch, T, args.d_model))
  x = jnp.asarray(x, args.dtype)
  program = jax.jit(forward if pass_ == 'forward' else both)
  program = program.lower(params, x, x).compile()
  memory = program.memory_analysis()
  peak = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
  )
  return lambda: jax.block_until_ready(program(params, x, x)), peak


def prepare_hugging_face(args, pass_, T):
  """The call of transformers' layer, window / 2 keys on either side."""
  import torch
  from transformers import LongformerConfig
  from transformers.models.longformer import modeling_longformer

  config = LongformerConfig(
    hidden_size=args.d_model,
    num_attention_heads=args.heads,
    attention_window=[args.window],
    num_hidden_layers=1,
    attention_probs_dropout_prob=0.0,
  )
  layer = modeling_longformer.LongformerSelfAttention(config, layer_id=0)
  x = torch.randn(args.batch, T, args.d_model, requires_grad=True)
  nothing = torch.zeros(args.batch, T)
  none = torch.zeros(args.batch, T, dtype=torch.bool)

  def forward():
    return layer(
      x,
      attention_mask=nothing,
      is_index_masked=none,
      is_index_global_attn=none,
      is_global_attn=False,
    )[0]

  if pass_ == 'forward':
    return torch.no_grad()(forward)
  inputs = [x, *(p for n, p in layer.named_parameters() if 'global' not in n)]
  return lambda: torch.autograd.grad(forward().sum(), inputs)


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


def has_hugging_face(args):
  packages = ('torch', 'transformers')
  return args.hf and all(importlib.util.find_spec(name) for name in packages)


def run_pass(args, pass_):
  """Prints the lines of a pass; returns {layer: {T: (seconds, bytes)}}."""
  found = {layer: {} for layer in args.layers}
  for T in args.lengths:
    calls, peaks = {}, {}
    for layer in args.layers:
      module = make_layer(args, layer)
      if not is_quadratic(module, T) or args.most_quadratic >= T:
        calls[layer], peaks[layer] = prepare(args, module, pass_, T)
    if has_hugging_face(args):
      calls[HUGGING_FACE] = prepare_hugging_face(args, pass_, T)
    seconds = time_in_turns(calls, args.repeats)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    for layer, median in medians.items():
      line = {'layer': layer, 'pass': pass_, 'T': T, 'B': args.batch}
      line |= dict(D=args.d_model, N=args.heads, dtype=args.dtype)
      line |= dict(
        seconds=round(median, 6), seconds_min=round(min(seconds[layer]), 6)
      )
      if layer in peaks:
        line |= dict(peak_bytes=peaks[layer])
        found[layer][T] = min(seconds[layer]), peaks[layer]
        if HUGGING_FACE in medians:
          ratio = medians[HUGGING_FACE] / median
          line |= dict(hf_seconds_ratio=round(ratio, 3))
      print(json.dumps(line), flush=True)
  return found


def main(argv=None):
  args = parse_arguments(argv)
  if args.keep:
    parallel.ensure_devices(1)
  for pass_ in args.passes:
    for layer, costs in run_pass(args, pass_).items():
      doublings = [
        (
          T,
          *(
            round(b / a, 3) for a, b in zip(costs[T], costs[2 * T], strict=True)
          ),
        )
        for T in costs
        if 2 * T in costs
      ]
      if doublings:
        line = {'layer': layer, 'pass': pass_}
        line['doubling'] = {T: time for T, time, _ in doublings}
        line['memory_doubling'] = {T: memory for T, _, memory in doublings}
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
