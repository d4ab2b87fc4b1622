"""Figure of the README: masks above, weights of recurrences below.

python -m docs.tools.picture

A row of a panel is a query, a column is a key. Recurrences are drawn by the
weights A of out = A v, which are read off by giving the identity as values.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from longctx import masks
from longctx.ops.recurrence import gated_delta_rule, linear_attention

T, H = 48, 8
PATH = pathlib.Path(__file__).parents[1] / 'images' / 'variants.png'
CAUSAL = masks.Causal()

MASKS = {
  'full': CAUSAL,
  'sliding_window': masks.SlidingWindow(11),
  'dilated': CAUSAL & masks.Dilated(window=12, dilation=3),
  'longformer': CAUSAL & (masks.SlidingWindow(7) | masks.GlobalTokens(3)),
  'bigbird': CAUSAL
  & (
    masks.SlidingWindow(7)
    | masks.GlobalTokens(4)
    | masks.RandomBlocks(block=4, per_row=1, seed=3)
  ),
  'streaming': CAUSAL & (masks.PrefixColumns(3) | masks.SlidingWindow(11)),
}


def weights_of_recurrences() -> dict[str, np.ndarray]:
  """The T x T weights of six recurrences, on the same queries and keys."""
  q_key, k_key, beta_key, fade_key = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(q_key, (1, T, 1, H))
  k = jax.random.normal(k_key, (1, T, 1, H))
  unit = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  beta = jax.nn.sigmoid(jax.random.normal(beta_key, (1, T, 1)) + 1)
  fade = jax.random.normal(fade_key, (1, T, 1, H))
  per_head = jax.nn.log_sigmoid(3 + 2 * fade[..., 0])
  per_channel = jax.nn.log_sigmoid(2 + 2 * fade)
  fixed = jnp.full((1, T, 1), jnp.log(0.9))
  v = jnp.eye(T)[None, :, None]
  outs = {
    'linear': linear_attention(
      jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, v, normalize=True
    ),
    'retention': linear_attention(q, k, v, log_decay=fixed),
    'mamba2': linear_attention(q, k, v, log_decay=per_head),
    'gla': linear_attention(q, k, v, log_decay=per_channel),
    'deltanet': gated_delta_rule(q, unit, v, beta),
    'gated_deltanet': gated_delta_rule(q, unit, v, beta, log_decay=per_head),
  }
  return {name: np.asarray(out[0, :, 0]) for name, (out, _) in outs.items()}


def main():
  figure, axes = plt.subplots(
    2, len(MASKS), figsize=(10, 3.9), layout='constrained'
  )
  for ax, (name, mask) in zip(axes[0], MASKS.items(), strict=True):
    ax.imshow(mask.dense(T, T), cmap='Blues', vmin=0, vmax=1.3)
    ax.set_title(name, fontsize=9, family='monospace')
  for ax, (name, weights) in zip(
    axes[1], weights_of_recurrences().items(), strict=True
  ):
    most = np.quantile(abs(weights[np.tril_indices(T)]), 0.98)
    ax.imshow(weights, cmap='RdBu', vmin=-most, vmax=most)
    ax.set_title(name, fontsize=9, family='monospace')
  for ax in axes.flat:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color('#cccccc')
  axes[0, 0].set_ylabel('masks')
  axes[1, 0].set_ylabel('recurrences')
  figure.savefig(PATH, dpi=110, metadata={'Software': None})


if __name__ == '__main__':
  main()
