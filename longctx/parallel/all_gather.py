"""All-gather attention: all keys on every device, for sequences that fit.

Queries stay where they are and the keys and values of the whole sequence are
gathered, O(S) memory per device; the backward pass scatters their gradients.
Good where keys are few (grouped queries) or links slow to start (Llama 3,
arXiv:2407.21783, section 3.3.2).

All functions here run inside of `shard_map`, on one device's arrays.
"""

from jax import lax

from longctx.parallel.layout import SequenceLayout
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
  B, L, *rest = x.shape
  if not rest:
    x = lax.all_gather(x, axis, axis=1, tiled=True)
    return layout.restore(x, local=True)
  # Heads and their dimension as one axis, as kernels take them, and no axis of
  # a single row: else the compiler of TPUs sums gradients whole on every device
  # where it could scatter them.
  if B == 1:
    x = lax.all_gather(x.reshape(L, -1), axis, axis=0, tiled=True)[None]
  else:
    x = lax.all_gather(x.reshape(B, L, -1), axis, axis=1, tiled=True)
  x = layout.restore(x, local=True)
  return x.reshape(*x.shape[:2], *rest)
