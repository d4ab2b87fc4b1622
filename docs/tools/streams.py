"""Figure of streams of several workdirs, side by side.

python -m docs.tools.streams docs/images/extension.png --trained=8192 \
  none=runs/smollm2 'YaRN, factor 2'=runs/smollm2-yarn
"""

import argparse
import json
import pathlib

from longctx.training import figures


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('streams', nargs='+', metavar='NAME=WORKDIR')
  parser.add_argument('--trained', type=int, required=True)
  parser.add_argument('--policy', default='dense')
  args = parser.parse_args()
  curves = {}
  for stream in args.streams:
    name, _, workdir = stream.partition('=')
    text = (pathlib.Path(workdir) / 'stream.jsonl').read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    curves[name] = [[row for row in rows if row['policy'] == args.policy]]
  figures.stream(args.out, curves, trained_at=args.trained)


if __name__ == '__main__':
  main()
