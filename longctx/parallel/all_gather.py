"""All keys on every device: the simplest scheme, for sequences that fit.

Queries stay where they are and the keys and values of the whole sequence are
gathered, O(S) memory per device; the backward pass scatters their gradients.
Good where keys are few (grouped queries) or links slow to start (Llama 3,
arXiv:2407.21783, section 3.3.2).

All functions here run inside of `shard_map`, on one device's arrays.
"""

from jax import lax

from longctx.layouts import SequenceLayout
from longctx.typing import Array, Shaped


def gather(
  x: Shaped[Array, 'B L *rest'] | None,
  *,
  axis: str | tuple[str, ...],
  layout: SequenceLayout,
) -> Shaped[Array, 'B T *rest'] | None:
  """The whole sequence in natural order, without padding."""
  if x is None:
    return None
  return layout.restore(lax.all_gather(x, axis, axis=1, tiled=True))
