"""Time per token of decoding, and how it grows with what was read before.

    python benchmarks/decode.py
    python benchmarks/decode.py --layers="full;linear" --contexts=1024,65536
    python benchmarks/decode.py --quick

Prints JSON lines. Per layer and context, a model of `--depth` such layers that
has read `context` tokens of `--batch` rows and goes on greedily:

    seconds, seconds_min   per token, median and least of `--repeats` runs of
                           `--steps` tokens; all layers take turns in one
                           process, so that a busy machine slows them alike
    tokens_per_second      of the whole batch
    row_bytes              what the cache holds of a row
    recompute_ratio        for layers with a window: time to read the window
                           anew for each token, as without a cache, over this
    torch_ratio            for `full`, where torch is installed: time of a plain
                           PyTorch loop over the same sizes, whose keys and
                           values are concatenated at each token, over this one

then, per layer, `growth`: time at the longest context over the shortest.

The process keeps memory that is freed, as `longctx.decoding.sampler` does; with
`--keep=0` it has what Python gives it, which slows PyTorch and not us.

Weights and caches are random or zero: time does not depend on them.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import parallel
from longctx.decoding import cache as cache_lib
from longctx.decoding.sampler import Generator, Stream
from longctx.models.transformer import Transformer, TransformerConfig

LAYERS = (
  'full;sliding_window(window=4096);'
  'streaming(num_sinks=4, window=4092, cache_positions=True);'
  'linear;gated_deltanet'
)
VOCAB = 256


def parse_arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  split = functools.partial(str.split, sep=';')
  integers = lambda text: [int(part) for part in text.split(',')]
  parser.add_argument('--layers', type=split, default=split(LAYERS))
  parser.add_argument('--contexts', type=integers, default=[1024, 8192, 65536])
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--depth', type=int, default=4)
  parser.add_argument('--d_model', type=int, default=256)
  parser.add_argument('--heads', type=int, default=4)
  parser.add_argument('--steps', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--recompute', type=int, default=1, help='0: leave it out'
  )
  parser.add_argument('--torch', type=int, default=1, help='0: leave it out')
  parser.add_argument(
    '--keep', type=int, default=1, help='0: give freed memory back'
  )
  parser.add_argument('--quick', action='store_true', help='seconds')
  args = parser.parse_args(argv)
  if args.quick:
    args.layers = ['full', 'streaming(num_sinks=2, window=6)', 'linear']
    args.contexts, args.steps, args.repeats = [16, 32], 4, 2
    args.depth, args.d_model, args.heads = 1, 16, 2
  return args


def make_model(args, layer):
  config = TransformerConfig(
    vocab_size=VOCAB,
    layers=(layer,) * args.depth,
    d_model=args.d_model,
    num_heads=args.heads,
    mlp_dim=4 * args.d_model,
  )
  return Transformer(config, rngs=nnx.Rngs(0))


def prepare(args, layer, context):
  """(call that draws `--steps` tokens, bytes of a row)."""
  model = make_model(args, layer)
  # A cache that holds every token is as long as it will be; others never grow.
  capacity = None if is_constant(model) else context + args.steps
  generator = Generator(model, capacity=capacity)
  cache = cache_lib.init(model, batch_size=args.batch, capacity=capacity)
  held = [
    Stream(
      cache=cache,
      logits=jnp.zeros((args.batch, VOCAB)),
      ended=jnp.zeros(args.batch, bool),
      count=jnp.int32(0),
    )
  ]
  key = jax.random.key(0)

  def call():
    stream = held.pop()
    lengths = jnp.full(args.batch, context, jnp.int32)
    stream = dataclasses.replace(
      stream, cache=dataclasses.replace(stream.cache, lengths=lengths)
    )
    stream, tokens = generator.draw(stream, key, args.steps)
    held.append(stream)
    jax.block_until_ready(tokens)

  return call, cache.row_bytes


def prepare_recompute(args, layer):
  """The call that reads a window anew for each of `--steps` tokens."""
  model = make_model(args, layer)
  window = model.blocks[0].attention.mask.kv_retention().slots(None)
  graph, params = nnx.split(model)
  tokens = jnp.zeros((args.batch, window), jnp.int32)
  last = jnp.full((args.batch, 1), window - 1)

  @jax.jit
  def read(params, tokens):
    model = nnx.merge(graph, params)
    x = model.hidden(model.embed(tokens), query_indices=last)
    return model.logits(x).argmax(-1)

  def call():
    jax.block_until_ready(read(params, tokens))

  return call


def is_constant(model):
  """Whether a token takes the same memory whatever came before."""
  return model.state_bytes(2**16) == model.state_bytes(2**17)


def has_window(args, layer):
  mask = make_model(args, layer).blocks[0].attention.mask
  return mask is not None and mask.kv_retention().window is not None


def prepare_torch(args, context):
  """The call of a plain loop: one token, concatenated caches, no compiler."""
  import torch

  B, D, N = args.batch, args.d_model, args.heads
  H = D // N
  weight = lambda *shape: torch.randn(*shape) / math.sqrt(shape[0])
  layers = [
    dict(
      qkv=weight(D, 3 * D),
      out=weight(D, D),
      up=weight(D, 4 * D),
      down=weight(4 * D, D),
    )
    for _ in range(args.depth)
  ]
  embedding = weight(VOCAB, D)
  frequencies = 10000.0 ** (-torch.arange(0, H, 2) / H)

  def rotate(x, position):
    angles = position * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  norm = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

  @torch.no_grad()
  def call():
    caches = [[torch.zeros(B, N, context, H) for _ in 'kv'] for _ in layers]
    token = torch.zeros(B, dtype=torch.long)
    start = time.perf_counter()
    for step in range(args.steps):
      x = embedding[token][:, None]
      for w, cache in zip(layers, caches, strict=True):
        qkv = (norm(x) @ w['qkv']).view(B, 1, 3, N, H).permute(2, 0, 3, 1, 4)
        q, k = (rotate(y, context + step) for y in qkv[:2])
        cache[0] = torch.cat([cache[0], k], 2)
        cache[1] = torch.cat([cache[1], qkv[2]], 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, *cache)
        x = x + out.transpose(1, 2).reshape(B, 1, D) @ w['out']
        hidden = torch.nn.functional.gelu(norm(x) @ w['up'])
        x = x + hidden @ w['down']
      token = (norm(x)[:, 0] @ embedding.T).argmax(-1)
    # Without making the caches.
    return time.perf_counter() - start

  return call


def timed(call):
  start = time.perf_counter()
  seconds = call()
  return time.perf_counter() - start if seconds is None else seconds


def run_context(args, context):
  """Prints the lines of a context; returns least seconds per layer."""
  calls, tokens, sizes = {}, {}, {}
  for layer in args.layers:
    calls[layer], sizes[layer] = prepare(args, layer, context)
    tokens[layer] = args.steps
    if args.recompute and has_window(args, layer):
      calls['recompute', layer] = prepare_recompute(args, layer)
      tokens['recompute', layer] = 1
  if args.torch and importlib.util.find_spec('torch'):
    calls['torch'], tokens['torch'] = prepare_torch(args, context), args.steps
  seconds = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(args.repeats):
    for name, call in calls.items():
      seconds[name].append(timed(call) / tokens[name])
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  for layer in args.layers:
    median = medians[layer]
    line = {'layer': layer, 'context': context, 'B': args.batch}
    line |= dict(D=args.d_model, N=args.heads, depth=args.depth)
    line |= dict(
      seconds=round(median, 7),
      seconds_min=round(min(seconds[layer]), 7),
      tokens_per_second=round(args.batch / median, 1),
      row_bytes=sizes[layer],
    )
    if ('recompute', layer) in medians:
      ratio = medians['recompute', layer] / median
      line |= dict(recompute_ratio=round(ratio, 2))
    if layer == 'full' and 'torch' in medians:
      line |= dict(torch_ratio=round(medians['torch'] / median, 3))
    print(json.dumps(line), flush=True)
  return {layer: min(seconds[layer]) for layer in args.layers}


def main(argv=None):
  args = parse_arguments(argv)
  if args.keep:
    parallel.ensure_devices(1)
  least = {context: run_context(args, context) for context in args.contexts}
  low, high = min(args.contexts), max(args.contexts)
  for layer in args.layers:
    growth = least[high][layer] / least[low][layer]
    line = {'layer': layer, 'from': low, 'to': high, 'growth': round(growth, 3)}
    print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
