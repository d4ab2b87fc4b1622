"""Attention context: positions, segments, dropout and mesh of the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from longctx.attention import segments
from longctx.attention.recurrence import Recurrence
from longctx.masks import Mask, check_mask
from longctx.ops import dot_product_attention as softmax
from longctx.ops import recurrence as recurrences
from longctx.ops import short_conv as convolution
from longctx.ops.block_selection import Summary
from longctx.ops.logit_bias import add_logit_bias
from longctx.parallel import Placement
from longctx.typing import Array, Float, Int, Key, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """Attention context: where tokens are, and the ops that mix them there.

  A model makes one and hands it down. A variant says what is mixed and calls
  the methods; whether the tokens lie on one device or on many, packed or not,
  read everywhere or at a few places, is nothing that it has to know.

  Attributes:
    positions: of the tokens; None means the natural ones, counted from 0 in
      each document, which lets an implementation know the mask's blocks when
      it compiles.
    segment_ids: documents packed into a row; none reads another.
    document_positions: `segment_positions`, where `counted` has made them.
    query_indices: places on the axis T whose outputs are wanted, see
      `at_queries`; None means all.
    dropout_key: of attention weights; None drops nothing.
    dropout_rate: share of them that is dropped, which a layer sets.
    step: of training, counted from 1, for what changes on a schedule; None
      before and without training.
    placement: where the tokens lie on a mesh, in the layout's order; None: all
      on one device.
    implementation: of the ops, by name; None takes the layer's.
    block_sizes: of softmax attention; None takes the layer's.
  """

  positions: Int[Array, '*B T'] | None = None
  segment_ids: Int[Array, 'B T'] | None = None
  document_positions: Int[Array, 'B T'] | None = None
  query_indices: Int[Array, 'B Q'] | None = None
  dropout_key: Key[Array, ''] | None = None
  dropout_rate: float = 0.0
  step: Int[Array, ''] | int | None = None
  placement: Placement | None = None
  implementation: str | None = None
  block_sizes: softmax.BlockSizes | None = None

  @classmethod
  def of(cls, context: Context | None, fields: Mapping[str, Any]) -> Context:
    """A context, or a new one, with some fields that are given by name."""
    if context is None:
      return cls(**fields)
    return context.replace(**fields) if fields else context

  def replace(self, **changes: Any) -> Context:
    if changes.keys() & {'positions', 'segment_ids', 'placement'}:
      changes.setdefault('document_positions', None)
    return dataclasses.replace(self, **changes)

  @property
  def dropout(self) -> tuple[float, Key[Array, '']] | None:
    """As ops take it."""
    if self.dropout_key is None or not self.dropout_rate:
      return None
    return self.dropout_rate, self.dropout_key

  def true_positions(self, T: int) -> Int[Array, '*B T']:
    """Positions of T tokens, by default counted from 0 in each document."""
    if self.positions is not None:
      return self.positions
    if self.segment_ids is not None:
      return self.segment_positions(T)
    return self.natural_positions(T)

  def natural_positions(self, T: int) -> Int[Array, ' T']:
    """Places of T tokens in their row, documents one after the other."""
    if self.placement is not None:
      return jnp.asarray(self.placement.layout.order)
    return jnp.arange(T)

  def segment_positions(self, T: int) -> Int[Array, '*B T']:
    """Positions of T tokens, counted from 0 in each document."""
    if self.document_positions is not None:
      return self.document_positions
    if self.segment_ids is None:
      return self.true_positions(T)

    def count(ids, positions):
      if positions is None:
        positions = jnp.arange(ids.shape[1])
      return segments.count_keys(positions, ids) - 1

    return self._of_rows(count, self.segment_ids, self.positions)

  def counted(self, T: int) -> Context:
    """The context with its `segment_positions`, counted once for all layers."""
    if self.segment_ids is None:
      return self
    return self.replace(document_positions=self.segment_positions(T))

  def cumulative_sum(self, x: Float[Array, 'B T N']) -> Float[Array, 'B T N']:
    """Sums over the tokens of a document up to each, in any layout."""

    def sums(x, positions, ids):
      if positions is None and ids is None:
        return jnp.cumsum(x, axis=1)
      if positions is None:
        positions = jnp.arange(x.shape[1])
      return segments.cumulative_sum(x, positions, ids)

    return self._of_rows(sums, x, self.positions, self.segment_ids)

  def _of_rows(
    self, function: Callable[..., Array], x: Array, *indices: Array | None
  ) -> Array:
    """function(x, *indices) of whole rows, wherever they lie."""
    if self.placement is None:
      return function(x, *indices)
    rows = [
      None if y is None else jnp.broadcast_to(y, x.shape[:2]) for y in indices
    ]
    return self.placement.of_whole_rows(function, x, *rows)

  def draw(self, index: int) -> Context:
    """The context with dropout of its own, for a layer or a group of heads.

    Heads are counted in the arrays of a call, so that without it the first of
    each group would drop the same weights.
    """
    if self.dropout_key is None:
      return self
    return self.replace(dropout_key=jax.random.fold_in(self.dropout_key, index))

  def natural_length(self, T: int) -> int | None:
    """How many positions T tokens take, None if positions are given.

    A layout's padding is not counted.
    """
    if self.positions is not None:
      return None
    return T if self.placement is None else self.placement.layout.seq_len

  def at_queries(
    self, x: Shaped[Array, 'B T ...'] | Shaped[Array, ' T'] | None
  ) -> Shaped[Array, ...] | None:
    """x at the places whose outputs are wanted, all of x by default.

    A place of -1 stands for none: what is taken there, the last place, is for
    the caller to ignore.
    """
    places = self.query_indices
    if x is None or places is None:
      return x
    if x.ndim == 1:
      return x[places]
    return x[jnp.arange(x.shape[0])[:, None], places]

  def dot_product_attention(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T _ V'],
    *,
    mask: Mask,
    q_bias: Float[Array, '#B T N'] | None = None,
    k_bias: Float[Array, '#B T N'] | None = None,
    **options: Any,
  ) -> Any:
    """Softmax attention under a mask, of the queries at `query_indices`.

    What a mask says of certain positions, such as the first ones, holds for
    each document.

    Args:
      q: queries of all the tokens.
      k: keys.
      v: values, as many heads as keys or a divisor: neighbouring key heads then
        share them.
      mask: who reads whom.
      q_bias: added to the logits of a query, per query head.
      k_bias: added to the logits of a key, per query head.
      **options: as in `ops.dot_product_attention`.

    Returns:
      As in ops, for the Q queries that are read.
    """
    check_mask(mask)
    q, k, v, options = biased(q, k, v, q_bias, k_bias, options)
    T, positions = q.shape[1], self.positions
    moves = all(part.shift_invariant for part in mask.primitives())
    if self.segment_ids is not None and not moves:
      positions = self.segment_positions(T)
    q_positions = positions
    if self.query_indices is not None and positions is None:
      # As the keys', whose places in the row they are.
      q_positions = self.natural_positions(T)
    return self.softmax_op(
      self.at_queries(q),
      k,
      v,
      mask=mask,
      q_positions=self.at_queries(q_positions),
      k_positions=positions,
      q_segment_ids=self.at_queries(self.segment_ids),
      k_segment_ids=self.segment_ids,
      dropout=self.dropout,
      block_sizes=self.block_sizes,
      implementation=self.implementation,
      **options,
    )

  @property
  def softmax_op(self) -> Callable[..., Any]:
    """The op of softmax attention, where the tokens are."""
    where = softmax if self.placement is None else self.placement
    return where.dot_product_attention

  def with_gathered_kv(
    self,
    op: Callable[..., Any],
    q: Float[Array, 'B T N H'],
    *keys: Float[Array, 'B T K _'],
    per_head: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    summarize: Callable[..., tuple[Summary, ...]] | None = None,
    **options: Any,
  ) -> Any:
    """Runs an op whose queries may turn to any key, such as those that choose.

    Args:
      op: of q, the keys, and where both are, as in `ops.block_selection`.
      q: queries of all the tokens.
      *keys: keys and values.
      per_head: arguments of `op` with an entry per query head.
      shared: arguments of `op` that are arrays, or trees of them, of a layer.
      summarize: of `shared` and the options, what the op makes of blocks of
        keys and a decoder keeps.
      **options: arguments of `op` that are no arrays.

    Returns:
      What `op` returns, for the Q queries that are read.
    """
    del summarize
    where, positions = self.placement, self.positions
    if self.segment_ids is not None:
      # What an op rotates itself, it rotates as `true_positions` do.
      positions = self.true_positions(q.shape[1])
    q_positions = positions
    if self.query_indices is not None and positions is None:
      q_positions = self.natural_positions(q.shape[1])
    indices = dict(
      q_positions=self.at_queries(q_positions),
      k_positions=positions,
      q_segment_ids=self.at_queries(self.segment_ids),
      k_segment_ids=self.segment_ids,
    )
    if self.dropout is not None:
      options['dropout'] = self.dropout
    options['implementation'] = self.implementation
    if where is None:
      arrays = {**(per_head or {}), **(shared or {})}
      return op(self.at_queries(q), *keys, **indices, **arrays, **options)
    return where.with_gathered_kv(
      op,
      self.at_queries(q),
      *keys,
      per_head=per_head,
      shared=shared,
      **indices,
      **options,
    )

  def recurrence(
    self,
    recurrence: Recurrence,
    q: Float[Array, 'B T N P'],
    k: Float[Array, 'B T K P'],
    v: Float[Array, 'B T K V'],
    *,
    beta: Float[Array, 'B T N'] | None = None,
    log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  ) -> Float[Array, 'B Q N V']:
    """Runs a recurrence over all the tokens; outputs at `query_indices`.

    Args:
      recurrence: what is kept, and how it changes.
      q: queries, or their features.
      k: keys, or their features.
      v: values.
      beta: the size of a step of the delta rule, which alone takes one.
      log_decay: nats per step, one per head or one per head and channel.
    """
    out, _ = recurrence.run(
      recurrences if self.placement is None else self.placement,
      *(q, k, v, beta),
      log_decay=log_decay,
      segment_ids=self.segment_ids,
      chunk_size=recurrence.chunk_size,
      implementation=self.implementation,
    )
    # The state passes every place, whichever are read.
    return self.at_queries(out)

  def values(
    self, own: Float[Array, '... V'], given: Float[Array, '... V']
  ) -> Float[Array, '... V']:
    """A layer's own values, of a branch or of no token.

    Analysis has those in their place that `attend` was given.
    """
    del given
    return own

  def short_conv(
    self, x: Float[Array, 'B T E'], kernel: Float[Array, 'W E']
  ) -> Float[Array, 'B T E']:
    """A causal depthwise convolution over the tokens."""
    kernel = kernel.astype(x.dtype)
    if self.placement is not None:
      return self.placement.short_conv(x, kernel, segment_ids=self.segment_ids)
    out, _ = convolution.short_conv(x, kernel, segment_ids=self.segment_ids)
    return out


def biased(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S _ V'],
  q_bias: Float[Array, '#B T N'] | None,
  k_bias: Float[Array, '#B S N'] | None,
  options: dict[str, Any],
) -> tuple[Array, Array, Array, dict[str, Any]]:
  """Arguments of the op, from those of `Context.dot_product_attention`."""
  if v.shape[2] < k.shape[2]:
    v = jnp.repeat(v, k.shape[2] // v.shape[2], axis=2)
  if q_bias is None and k_bias is None:
    return q, k, v, options
  scale = options.get('scale')
  q, k = add_logit_bias(q, k, q_bias=q_bias, k_bias=k_bias, scale=scale)
  return q, k, v, {**options, 'scale': 1.0}
