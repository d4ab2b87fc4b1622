"""Attention sinks in a model of bytes: what a stream loses without them.

    python studies/streaming/run.py
    python studies/streaming/run.py --seeds=0 --stream_tokens=0
    python studies/streaming/run.py --quick

Trains configs/streaming.py from each seed, then reads the test split by
`eval.py --mode=stream`: a short stream under every policy, each token of it
scored, and for the first seed an endless one under `sinks`. All of it can be
stopped and started again. Writes results.json, table.md and streams.png beside
this file; the runs themselves go to runs/streaming.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys

import numpy as np

from longctx import evaluate, metrics

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent

POLICIES = ('dense', 'recompute', 'window', 'sinks', 'sinks_text')


def parse_arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  integers = lambda text: [int(part) for part in text.split(',')]
  parser.add_argument('--seeds', type=integers, default=[0, 1, 2])
  parser.add_argument('--tokens', type=int, default=2048, help='short stream')
  parser.add_argument('--rows', type=int, default=8, help='of the short one')
  parser.add_argument(
    '--stream_tokens', type=int, default=4_000_000, help='of the first seed'
  )
  parser.add_argument(
    '--workdir', type=pathlib.Path, default=ROOT / 'runs/streaming'
  )
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  parser.add_argument('--quick', action='store_true', help='minutes, 1 seed')
  args = parser.parse_args(argv)
  if args.quick:
    args.seeds, args.stream_tokens, args.rows = args.seeds[:1], 0, 2
  return args


def run(*command):
  subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def measure(args, seed):
  """The lines of the short stream by policy, those of the endless one."""
  workdir = args.workdir / f'seed{seed}'
  train = ['train.py', '--config=configs/streaming.py']
  train += [f'--config.seed={seed}', f'--workdir={workdir}']
  run(*train, *['--config.steps=100'] * args.quick)
  stream = ['eval.py', f'--workdir={workdir}', '--mode=stream']
  run(
    *stream,
    f'--policies={",".join(POLICIES)}',
    f'--tokens={args.tokens}',
    f'--dense_tokens={args.tokens}',
    f'--rows={args.rows}',
    f'--bucket={args.tokens}',
    f'--recomputed={args.tokens}',
  )
  path = workdir / 'stream.jsonl'
  short = metrics.read_lines(path)
  shutil.copy(workdir / 'figures' / 'stream.png', args.out / 'streams.png')
  endless = []
  if args.stream_tokens and seed == args.seeds[0]:
    run(
      *stream,
      '--policies=sinks',
      f'--tokens={args.stream_tokens}',
      '--chunk=512',
      '--bucket=65536',
    )
    lines = metrics.read_lines(path)
    endless = [row for row in lines if row['policy'] == 'sinks']
  return {name: of_policy(short, name) for name in POLICIES}, endless


def of_policy(rows, name):
  return [row for row in rows if row['policy'] == name]


def summary(args, seed):
  """What a seed shows, in nats per byte."""
  short, endless = measure(args, seed)
  found = {'seed': seed}
  # Every token of the last bucket, long after the first ones have left.
  found |= {name: rows[-1]['loss'] for name, rows in short.items()}
  found['scored'] = short['sinks'][-1]['count']
  # Within the trained length nothing has left.
  found['dense_trained'] = short['dense'][1]['loss']
  if endless:
    workdir = args.workdir / f'seed{seed}'
    task = evaluate.choose(evaluate.open_workdir(workdir), '').task
    passes = by_pass(endless, len(task.text('test')))
    found['loss_of_passes'] = passes
    found['drift'] = passes[-1] - passes[0]
    found['peak_memory'] = [endless[3]['peak_memory']]
    found['peak_memory'] += [endless[-1]['peak_memory']]
    found['seconds'] = sum(row['seconds'] for row in endless)
  return found


def by_pass(rows, length):
  """The mean loss of each whole pass through the text, which begins anew."""
  whole = [row for row in rows if row['end'] - row['begin'] == 65536]
  found = []
  for index in range(whole[-1]['end'] // length):
    inside = [
      row
      for row in whole
      if index * length <= row['begin'] and row['end'] <= (index + 1) * length
    ]
    counts = [row['count'] for row in inside]
    losses = [row['loss'] for row in inside]
    found.append(float(np.average(losses, weights=counts)))
  return found


def table(entries):
  """Markdown: the policies, median and range over the seeds."""
  lines = ['| policy | nats per byte | above `recompute` |', '|---|---|---|']
  spread = lambda xs: (
    f'{statistics.median(xs):.3f} ({min(xs):.3f} to {max(xs):.3f})'
  )
  for name in POLICIES:
    losses = [entry[name] for entry in entries]
    above = [entry[name] - entry['recompute'] for entry in entries]
    lines.append(f'| `{name}` | {spread(losses)} | {spread(above)} |')
  return '\n'.join(lines) + '\n'


def main(argv=None):
  args = parse_arguments(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  entries = [summary(args, seed) for seed in args.seeds]
  (args.out / 'results.json').write_text(json.dumps(entries, indent=2) + '\n')
  (args.out / 'table.md').write_text(table(entries))
  print(table(entries))


if __name__ == '__main__':
  main()
