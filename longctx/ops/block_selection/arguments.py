"""Arguments of block-selection attention: checked once, then passed whole."""

from typing import NamedTuple

import jax.numpy as jnp

from longctx.ops.block_selection.compression import Compression
from longctx.ops.dot_product_attention.dropout import Dropout
from longctx.ops.rope import Rope
from longctx.typing import Array, Float, Int


class SelectionArgs(NamedTuple):
  """Arguments of every implementation of MoBA and NSA, defaults filled in.

  Attributes:
    q_positions: Bq is 1 or B, as is Bk; None: 0 to T - 1.
    k_positions: None: 0 to S - 1.
    q_segment_ids: given where those of the keys are.
    k_segment_ids: None where all tokens are of one segment.
    alibi_slopes: of MoBA alone, like the dropout.
    summaries: of blocks, that a decoder keeps.
  """

  q_positions: Int[Array, 'Bq T'] | None
  k_positions: Int[Array, 'Bk S'] | None
  q_segment_ids: Int[Array, 'B T'] | None
  k_segment_ids: Int[Array, 'B S'] | None
  scale: float
  alibi_slopes: Float[Array, ' N'] | None
  dropout: Dropout | None
  summaries: tuple[Array, ...] | None

  def positions(
    self, T: int, S: int
  ) -> tuple[Int[Array, 'Bq T'], Int[Array, 'Bk S']]:
    """Of T queries and S keys, the natural ones where none are given."""
    q, k = self.q_positions, self.k_positions
    return (
      jnp.arange(T)[None] if q is None else q,
      jnp.arange(S)[None] if k is None else k,
    )


class NSAConfig(NamedTuple):
  """Hyperparameters of NSA; see `longctx.ops.block_selection.nsa`."""

  compress_k: Compression
  compress_v: Compression
  stride: int
  block_size: int
  top_n: int
  num_initial: int
  num_local: int
  rope: Rope | None

  @property
  def length(self) -> int:
    """Tokens of a compressed block, L."""
    return self.compress_k.embedding.shape[0]

  @property
  def num_free(self) -> int:
    """Blocks that a query chooses, besides initial and local ones."""
    return self.top_n - self.num_initial - self.num_local
