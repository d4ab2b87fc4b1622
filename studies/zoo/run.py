"""Trains every variant on MQAR from several seeds: medians and ranges.

    python studies/zoo/run.py
    python studies/zoo/run.py --seeds=0,1 --argument=full,linear
    python studies/zoo/run.py --quick

Each seed is one run of configs/zoo.py, which can be stopped and started again:
the same command continues. Writes results.json, one entry per variant, and
table.md, the table of the README, beside this file; the runs themselves go to
runs/zoo.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from tqdm import tqdm

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent

MEASURED = ('accuracy', 'steps_to_90', 'tokens_per_second')
FIXED = ('parameters', 'state_bytes')


def parse_arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  integers = lambda text: [int(part) for part in text.split(',')]
  parser.add_argument('--seeds', type=integers, default=[0, 1, 2])
  parser.add_argument('--argument', default='', help='of configs/zoo.py')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--workdir', type=pathlib.Path, default=ROOT / 'runs/zoo')
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  parser.add_argument('--quick', action='store_true', help='50 steps, 1 seed')
  args = parser.parse_args(argv)
  if args.quick:
    args.seeds = args.seeds[:1]
  return args


def command(args, seed):
  """What trains all variants from a seed."""
  config = '--config=configs/zoo.py' + f':{args.argument}' * bool(args.argument)
  steps = ['--config.steps=50'] * args.quick
  workdir = args.workdir / f'seed{seed}'
  return [
    *('train.py', config, f'--config.seed={seed}', *steps),
    f'--workdir={workdir}',
  ]


def train(args):
  """Runs the seeds, `--processes` at a time."""
  waiting, running = list(args.seeds), []
  with tqdm(total=len(args.seeds), desc='seeds') as bar:
    while waiting or running:
      while waiting and len(running) < args.processes:
        seed = waiting.pop(0)
        process = [sys.executable, *command(args, seed)]
        running.append(subprocess.Popen(process, cwd=ROOT))
      done = running.pop(0)
      if done.wait():
        raise SystemExit(f'{" ".join(done.args)} ended with {done.returncode}')
      bar.update()


def spread(values):
  """Median and range; a run that never got there counts as the worst."""
  reached = sorted(v for v in values if v is not None)
  missing = len(values) - len(reached)
  ordered = [*reached, *[None] * missing]
  median = ordered[len(ordered) // 2]
  if not missing:
    median = statistics.median(reached)
  return {'median': median, 'low': ordered[0], 'high': ordered[-1]}


def collect(args):
  """One entry per variant, over the seeds."""
  by_seed = [
    json.loads((args.workdir / f'seed{seed}' / 'results.json').read_text())
    for seed in args.seeds
  ]
  commit = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  entries = []
  for name in by_seed[0]:
    rows = [results[name] for results in by_seed]
    entry = {'variant': name}
    entry |= {key: spread([row[key] for row in rows]) for key in MEASURED}
    entry |= {key: rows[0][key] for key in FIXED}
    entry |= {'chance': rows[0]['chance'], 'steps': rows[0]['steps']}
    entry |= {'seeds': args.seeds, 'commit': commit}
    entry['command'] = 'python ' + ' '.join(command(args, args.seeds[0])[:-1])
    entries.append(entry)
  return sorted(entries, key=lambda e: -e['accuracy']['median'])


def table(entries):
  """Markdown, best first."""
  lines = [
    '| variant | accuracy | to 90% | parameters | state bytes | tokens/s |',
    '|---|---|---|---|---|---|',
  ]
  for entry in entries:
    accuracy, steps = entry['accuracy'], entry['steps_to_90']
    low, high = f'{accuracy["low"]:.3f}', f'{accuracy["high"]:.3f}'
    never = lambda step: 'never' if step is None else f'{step:.0f}'
    reached = f'{never(steps["median"])} ({never(steps["low"])} to '
    reached += f'{never(steps["high"])})'
    if steps['low'] is None:
      reached = 'never'
    lines.append(
      f'| `{entry["variant"]}` | {accuracy["median"]:.3f} ({low} to {high}) | '
      f'{reached} | {entry["parameters"]:,} | '
      f'{entry["state_bytes"]:,} | '
      f'{entry["tokens_per_second"]["median"]:,.0f} |'
    )
  return '\n'.join(lines) + '\n'


def main(argv=None):
  args = parse_arguments(argv)
  train(args)
  entries = collect(args)
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / 'results.json').write_text(json.dumps(entries, indent=2) + '\n')
  (args.out / 'table.md').write_text(table(entries))
  print(table(entries))


if __name__ == '__main__':
  main()
