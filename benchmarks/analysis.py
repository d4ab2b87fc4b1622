"""Time and memory of looking at heads: at a million tokens, and in training.

    python benchmarks/analysis.py                     # 1,048,576 tokens
    python benchmarks/analysis.py --tokens=65536 --layer=gated_deltanet
    python benchmarks/analysis.py --training --config=configs/induction.py
    python benchmarks/analysis.py --quick

Prints JSON lines. Of a long sequence, 25 symbols again and again behind a first
token, through one layer with random parameters: the scores of its heads that
`heads.positions` and `heads.prefixes` ask for, sink rate and prefix matching
among them, `seconds`, compilation included, and the process's `peak_memory` in
bytes.

With --training: `step_seconds` of an update and `analysis_seconds` of an
analysis after both are compiled, medians of calls that take turns, and `share`,
what an analysis every `--every` steps costs of a step.
"""

import argparse
import functools
import importlib.util
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import parallel, tasks
from longctx.analysis import heads, sequences
from longctx.analysis.analyzer import Analyzer
from longctx.attention import AttentionConfig, make_attention
from longctx.attention.context import Context
from longctx.training import config as config_lib
from longctx.training import runs, steps


def million(args):
  """Prints the line of a long sequence."""
  found = sequences.repeated(
    np.arange(1, 26),
    rows=1,
    seq_len=args.tokens,
    repeats=args.tokens,
    first=0,
  )
  config = AttentionConfig(
    d_model=args.heads * 16,
    num_heads=args.heads,
    num_kv_heads=args.heads,
    head_dim=16,
    value_dim=16,
  )
  layer = make_attention(args.layer, config, rngs=nnx.Rngs(0))
  graph, params = nnx.split(layer)
  shape = (len(found.symbols), config.d_model)
  table = jax.random.normal(jax.random.key(0), shape)
  x = table[jnp.asarray(found.classes)]
  arrays = (found.classes, found.previous, found.seen)

  @jax.jit
  def scores_of(params, x, arrays):
    real = jnp.ones(found.tokens.shape, bool)
    tokens = heads.Tokens(*arrays, real=real)
    questions = [
      heads.positions(real, Context(), seq_len=args.tokens),
      heads.prefixes(tokens, len(found.symbols)),
    ]
    layer = nnx.merge(graph, params)
    return heads.ask(layer, x, questions, Context(), width=args.width)

  begun = time.perf_counter()
  scores = jax.device_get(scores_of(params, x, arrays))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print_line(
    layer=args.layer,
    heads=args.heads,
    tokens=args.tokens,
    seconds=round(time.perf_counter() - begun, 2),
    peak_memory=peak,
    **{name: value.tolist() for name, value in scores.items()},
  )


def training(args):
  """Prints the line of an analysis beside an update."""
  spec = importlib.util.spec_from_file_location('config', args.config)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = config_lib.from_config_dict(
    config_lib.ExperimentConfig, module.get_config()
  )
  task = tasks.make_task(**config.task)
  model = runs.resolve_model(config.model, task)
  graph, _ = steps.abstract_params(model)
  state = steps.init_state(model, config)
  train = steps.make_steps(graph, config).train
  batches = runs.open_batches(config, task, 'train')
  analyzer = Analyzer(graph, model, task, rows=args.rows)
  step_times, analysis_times = [], []
  for step in range(1, args.repeats + 2):
    batch = steps.put(next(batches), None)
    begun = time.perf_counter()
    state, values = train(state, batch, np.int32(step))
    jax.block_until_ready((state, values))
    step_times.append(time.perf_counter() - begun)
    if step % 5 == 1:
      begun = time.perf_counter()
      analyzer.measure(state['params'], step)
      analysis_times.append(time.perf_counter() - begun)
  batches.close()
  # The first of each has compiled.
  step_seconds = statistics.median(step_times[1:])
  analysis_seconds = statistics.median(analysis_times[1:])
  print_line(
    config=args.config,
    step_seconds=round(step_seconds, 5),
    analysis_seconds=round(analysis_seconds, 5),
    compile_seconds=round(analysis_times[0], 2),
    every=args.every,
    rows=args.rows,
    share=round(analysis_seconds / (args.every * step_seconds), 5),
  )


print_line = lambda **row: print(json.dumps(row), flush=True)


def main(argv=None):
  formatter = functools.partial(
    argparse.RawDescriptionHelpFormatter, max_help_position=26
  )
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=formatter
  )
  parser.add_argument('--tokens', type=int, default=1 << 20)
  parser.add_argument('--layer', default='full')
  parser.add_argument('--heads', type=int, default=1, help='of 16 channels')
  parser.add_argument('--width', type=int, default=56, help='of a pass')
  parser.add_argument('--training', action='store_true')
  parser.add_argument('--config', default='configs/induction.py')
  parser.add_argument('--every', type=int, default=100)
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=50)
  parser.add_argument('--quick', action='store_true', help='seconds')
  args = parser.parse_args(argv)
  parallel.ensure_devices(1)
  if args.quick:
    args.tokens, args.repeats = 600, 11
  if args.training or args.quick:
    training(args)
  if not args.training:
    million(args)


if __name__ == '__main__':
  main()
