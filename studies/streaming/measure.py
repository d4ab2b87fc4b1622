"""Reads the test split by a trained model, under what each policy keeps.

    python -m studies.streaming.measure --workdir=DIR --tokens=2048

A short stream under every policy, each token of it scored, and with
--stream_tokens an endless one under `sinks`. `eval.py stream` keeps the
lines of one stream per policy, so those of the short one are set aside in
short.jsonl. Stopped and started again it continues.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

from studies.common import ROOT

POLICIES = ('dense', 'recompute', 'window', 'sinks', 'sinks_text')
BUCKET = 65536


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--tokens', type=int, default=2048, help='short stream')
  parser.add_argument('--rows', type=int, default=8, help='of the short one')
  parser.add_argument('--stream_tokens', type=int, default=0, help='endless')
  args = parser.parse_args()
  stream = [sys.executable, 'eval.py', 'stream']
  stream += [f'--workdir={args.workdir}']
  tokens = args.tokens
  short = [f'--policies={",".join(POLICIES)}', f'--rows={args.rows}']
  short += [
    f'--{name}={tokens}'
    for name in ('tokens', 'dense_tokens', 'bucket', 'recomputed')
  ]
  subprocess.run([*stream, *short], cwd=ROOT, check=True)
  shutil.copy(args.workdir / 'stream.jsonl', args.workdir / 'short.jsonl')
  if args.stream_tokens:
    endless = ['--policies=sinks', f'--tokens={args.stream_tokens}']
    endless += ['--chunk=512', f'--bucket={BUCKET}']
    subprocess.run([*stream, *endless], cwd=ROOT, check=True)


if __name__ == '__main__':
  main()
