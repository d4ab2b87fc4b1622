"""What a recurrent layer keeps, as a description to derive the rest from."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrence:
  """A matrix state of key_dim x columns numbers per head, in float32.

  The counterpart of a mask: `Context.recurrence` runs it, on one device or
  several, and costs follow.

  Attributes:
    heads: states of one layer, N.
    key_dim: rows P, what a key or its features have.
    value_dim: width V of a value.
    normalize: whether a sum of the keys is kept as one more column, to divide
      by.
    delta: the delta rule (`gated_delta_rule`), which replaces what the state
      held for a key; else values are added (`linear_attention`).
    scale: factor of the output.
    chunk_size: tokens C that are mixed by matrix products.
  """

  heads: int
  key_dim: int
  value_dim: int
  normalize: bool = False
  delta: bool = False
  scale: float = 1.0
  chunk_size: int = 64

  def __post_init__(self):
    for name in ('heads', 'key_dim', 'value_dim', 'chunk_size'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.delta and self.normalize:
      raise ValueError('the delta rule has no sum of keys to normalize by')

  @property
  def state_shape(self) -> tuple[int, int, int]:
    """Of one row: heads, P, and V with the column of the normalizer."""
    return self.heads, self.key_dim, self.value_dim + self.normalize

  def flops(self, seq_len: int) -> int:
    """FLOPs of the chunkwise form: within chunks, and through the state."""
    heads, rows, columns = self.state_shape
    C = self.chunk_size
    inside, through = C * (rows + columns), 2 * rows * columns
    if self.delta:
      # Keys ask the state and each other too, and a triangle is inverted.
      inside, through = 2 * inside + C**2 // 3, through + rows * columns
    return 2 * heads * seq_len * (inside + through)
