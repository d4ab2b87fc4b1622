"""Gated attention: softmax attention whose outputs are gated."""

import jax
from flax import nnx

from longctx import masks
from longctx.attention.base import Attention, AttentionConfig, make_linear
from longctx.typing import Array, Float


class OutputGateAttention(Attention):
  """Gated attention: a sigmoid gate on the outputs of softmax attention.

      out_t = σ(W x_t) ⊙ Σ_{s ≤ t} softmax_s(q_t k_s / √H) v_s

  'Gated Attention for Large Language Models' (arXiv:2505.06708), the form that
  is best there: after mixing, of each head its own. A gate near 0 attends to
  nothing, so that no sink is needed, and it is a nonlinearity between the value
  and output projections. Cost and state are those of full attention, and the
  gate's projection.

  Attributes:
    headwise: one gate per head; otherwise one per head and value channel.
  """

  mask = masks.Causal()

  def __init__(
    self, config: AttentionConfig, *, headwise: bool = False, rngs: nnx.Rngs
  ):
    super().__init__(config, rngs=rngs)
    width = 1 if headwise else config.value_dim
    gates = config.num_heads * width
    self.gate = make_linear(config, config.d_model, gates, rngs=rngs)

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    gate = jax.nn.sigmoid(self.gate(x))
    return out * gate.reshape(*out.shape[:3], -1)
