"""Speed of a pretrained model: prefill and decoding, beside other programs.

    python -m longctx.pretrained fetch smollm2
    python benchmarks/pretrained.py
    python benchmarks/pretrained.py --peers=transformers --python=PATH
    python benchmarks/pretrained.py --quick

Prints JSON lines. Programs in processes of their own that have loaded the same
file take turns: this package (`longctx`) and transformers on PyTorch, both in
`--dtype`, and llama.cpp with the file's own quantised weights, those of them
that `--python` has installed. Per program, of `--rounds` runs the best,
with all of them beside it:

    prefill      tokens per second of a prompt of `--prompt` tokens, of which
                 the last one's logits are made
    decode       tokens per second of one row that goes on greedily for
                 `--steps` tokens, after each of `--contexts`

and a line `machine`, of what the process of this package measures between them:
GB/s that it reads, GFLOP/s of a float32 product, and the load. Then `shares`:
of decoding, the time that it takes to read the weights once at that rate over
the time of a token, and ratios to the other programs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import parallel
from longctx.decoding.sampler import Generator, Prompts
from longctx.pretrained import load
from longctx.pretrained.fetch import WHEELS, cached

PEERS = {'transformers': 'gguf', 'llama_cpp': 'llama_cpp'}


def parse_arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  integers = lambda text: [int(part) for part in text.split(',')]
  parser.add_argument('--source', default='smollm2', help='as load takes it')
  parser.add_argument('--contexts', type=integers, default=[128, 2048])
  parser.add_argument('--prompt', type=int, default=1024)
  parser.add_argument('--steps', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=4)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--peers', default=','.join(PEERS), help="'' for none")
  parser.add_argument(
    '--python', default=sys.executable, help='which the other programs have'
  )
  parser.add_argument('--quick', action='store_true', help='a minute')
  args = parser.parse_args(argv)
  if args.quick:
    args.contexts, args.prompt, args.steps, args.rounds = [32], 64, 4, 1
  return args


def timed(call):
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def some_tokens(count):
  return [token % 251 for token in range(count)]


def prepare(args):
  """(machine, prefill, {context: decode}): calls that give what is printed."""
  parallel.ensure_devices(1)
  model = load(args.source, dtype=args.dtype).model
  key = jax.random.key(0)
  params = jax.tree.leaves(nnx.state(model))
  x, a = jnp.ones(2**26), jnp.ones((1024, 1024))
  read, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
  wait = jax.block_until_ready

  def machine():
    seconds = min(timed(lambda: wait(read(x))) for _ in range(5))
    products = min(timed(lambda: wait(product(a, a))) for _ in range(5))
    return dict(
      read_gb_per_s=round(x.nbytes / seconds / 1e9, 1),
      product_gflop_per_s=round(2 * 1024**3 / products / 1e9, 1),
      load=round(os.getloadavg()[0], 2),
      weight_bytes=sum(p.nbytes for p in params),
    )

  def decoder(context):
    capacity = context + args.steps * (args.rounds + 1)
    generator = Generator(model, capacity=capacity)
    held = [generator.start(Prompts.of([some_tokens(context)]))]

    def call():
      held[0], tokens = generator.draw(held[0], key, args.steps)
      wait(tokens)

    return call

  reader = Generator(model, capacity=args.prompt)
  prompt = Prompts.of([some_tokens(args.prompt)])
  prefill = lambda: wait(reader.start(prompt).logits)
  return machine, prefill, {c: decoder(c) for c in args.contexts}


def start_peer(args, name, source):
  """The process of another program, once it has loaded the model."""
  # Not beside its file, where kernels.py would be taken for another package.
  command = [args.python, '-P', Path(__file__).with_name('pretrained_peers.py')]
  command += [name, source, f'--contexts={",".join(map(str, args.contexts))}']
  for key in ('dtype', 'prompt', 'steps', 'rounds'):
    command.append(f'--{key}={getattr(args, key)}')
  process = subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if line.strip() == 'ready':
      return process
  raise SystemExit(f'{name} ended before it was ready: see above')


def ask(process):
  process.stdin.write('go\n')
  process.stdin.flush()
  return json.loads(process.stdout.readline())


def has(python, module):
  code = f'import importlib.util as u; exit(not u.find_spec({module!r}))'
  return not subprocess.run([python, '-c', code]).returncode


def best(lines):
  """The best of several runs, and all of them."""
  found = {'prefill': max(line['prefill'] for line in lines), 'decode': {}}
  for context in lines[0]['decode']:
    found['decode'][context] = max(line['decode'][context] for line in lines)
  return found


def rounded(value):
  if isinstance(value, dict):
    return {key: rounded(x) for key, x in value.items()}
  return round(value, 2)


def compare(found, machine):
  """Shares of the machine's rate of reading, and ratios to others."""
  ours, line = found['longctx'], {}
  limit = machine['read_gb_per_s'] * 1e9 / machine['weight_bytes']
  line['share_of_reading_weights'] = {
    context: rate / limit for context, rate in ours['decode'].items()
  }
  for name in found.keys() - {'longctx'}:
    theirs = found[name]
    decode = {c: r / theirs['decode'][c] for c, r in ours['decode'].items()}
    ratio = ours['prefill'] / theirs['prefill']
    line[f'{name}_ratio'] = {'prefill': ratio, 'decode': decode}
  return rounded(line)


def main(argv=None):
  args = parse_arguments(argv)
  source = cached(args.source) if args.source in WHEELS else Path(args.source)
  if not source.exists():
    raise SystemExit(f'{source} is missing: python -m longctx.pretrained fetch')
  machine, prefill, decoders = prepare(args)
  for call in (prefill, *decoders.values()):
    call()
  names = [p for p in PEERS if p in args.peers.split(',')]
  peers = {
    name: start_peer(args, name, source)
    for name in names
    if has(args.python, PEERS[name])
  }
  machines, lines = [], {name: [] for name in ('longctx', *peers)}
  for _ in range(args.rounds):
    machines.append(machine())
    decode = {str(c): args.steps / timed(f) for c, f in decoders.items()}
    line = {'prefill': args.prompt / timed(prefill), 'decode': decode}
    lines['longctx'].append(line)
    for name, process in peers.items():
      lines[name].append(ask(process))
  for process in peers.values():
    process.communicate()
  loads = [m.pop('load') for m in machines]
  machine = {key: max(m[key] for m in machines) for key in machines[0]}
  print(json.dumps({'machine': machine | {'loads': loads}}))
  found = {name: best(runs) for name, runs in lines.items()}
  for name, runs in lines.items():
    line = {'program': name, 'dtype': args.dtype, **rounded(found[name])}
    if name == 'llama_cpp':
      line['dtype'] = 'as in the file'
    print(json.dumps(line | {'runs': [rounded(run) for run in runs]}))
  print(json.dumps({'shares': compare(found, machine)}))


if __name__ == '__main__':
  main()
