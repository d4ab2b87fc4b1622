"""Recurrent state of linear attention and the delta rule, as a description."""

import dataclasses
from typing import Any

from longctx.attention.config import AttentionConfig
from longctx.typing import Array, Checked, Float, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrence(Checked):
  """Recurrent state: a matrix of key_dim x columns per head, in float32.

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

  heads: Positive
  key_dim: Positive
  value_dim: Positive
  normalize: bool = False
  delta: bool = False
  scale: float = 1.0
  chunk_size: Positive = 64

  def check(self):
    if self.delta and self.normalize:
      raise ValueError('the delta rule has no sum of keys to normalize by')

  @classmethod
  def of(cls, config: AttentionConfig, **fields: Any) -> 'Recurrence':
    """The state of a layer whose keys are as wide as its heads."""
    sizes = dict(
      heads=config.num_heads,
      key_dim=config.head_dim,
      value_dim=config.value_dim,
      chunk_size=config.chunk_size,
    )
    return cls(**{**sizes, **fields})

  def run(
    self,
    ops: Any,
    q: Float[Array, 'B T N P'],
    k: Float[Array, 'B T K P'],
    v: Float[Array, 'B T K V'],
    beta: Float[Array, 'B T N'] | None,
    **options: Any,
  ) -> tuple[Float[Array, 'B T N V'], Float[Array, '...']]:
    """(out, state) by `ops.linear_recurrence`, here or on a mesh."""
    if self.delta != (beta is not None):
      raise ValueError(f'{self.delta=}, and the delta rule alone takes beta')
    options |= dict(scale=self.scale, normalize=self.normalize)
    return ops.linear_recurrence(q, k, v, beta, **options)

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
