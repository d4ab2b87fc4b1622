"""Draws the loss along the short stream, under each policy.

python -m studies.streaming.plot
"""

import pathlib

from longctx.training import figures, metrics

HERE = pathlib.Path(__file__).parent
TRAINED_AT = 256


def show(rows, folder: pathlib.Path):
  """Writes streams.png, of the first seed."""
  figures.stream(
    folder / 'streams.png', rows[0]['curves'], trained_at=TRAINED_AT
  )


if __name__ == '__main__':
  show(metrics.read_lines(HERE / 'results.jsonl'), HERE)
