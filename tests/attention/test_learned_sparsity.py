"""MoBA and NSA as layers: limits, equations and costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.attention import AttentionConfig, make_attention
from tests.tiny import tiny_layer
from tests.tolerances import tolerance

D, N, K, H, V = 8, 4, 2, 4, 6
CONFIG = AttentionConfig(
  d_model=D,
  num_heads=N,
  num_kv_heads=K,
  head_dim=H,
  value_dim=V,
  position_encoding='none',
)


def make_layer(layer, **changes):
  """A layer in which no parameter is small."""
  config = dict(vars(CONFIG)) | changes
  layer = make_attention(layer, AttentionConfig(**config), rngs=nnx.Rngs(0))
  graph, params = nnx.split(layer)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params
  )
  return nnx.merge(graph, params)


def apply(layer, x, **options):
  fast = {'xla_backend_optimization_level': 0}
  return jax.jit(lambda x: layer(x, **options), compiler_options=fast)(x)


def make_input(T, B=2):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


@pytest.mark.parametrize('position_encoding', ['rope', 'alibi'])
def test_moba_of_all_blocks_is_full_attention(position_encoding):
  moba = make_layer(
    'moba(block_size=4, top_k=6)', position_encoding=position_encoding
  )
  full = make_layer('full', position_encoding=position_encoding)
  x, key = make_input(21), jax.random.key(0)
  np.testing.assert_allclose(
    apply(moba, x), apply(full, x), **tolerance('float32')
  )
  for layer in (moba, full):
    layer.config = AttentionConfig(
      **vars(layer.config) | {'attention_dropout': 0.3}
    )
  np.testing.assert_allclose(
    apply(moba, x, dropout_key=key),
    apply(full, x, dropout_key=key),
    **tolerance('float32'),
  )


def softmax(z):
  z = np.exp(z - z.max())
  return z / z.sum()


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def nsa_by_hand(layer, x):
  """One row of the layer, a query and a head at a time, in float64."""
  T = len(x)
  small = dict(L=4, d=2, C=4, top_n=3, window=3)
  L, d, C, top_n, window = small.values()
  weight = lambda linear: np.asarray(linear.kernel[...], np.float64)
  q = (x @ weight(layer.query)).reshape(T, N, H)
  k = (x @ weight(layer.key)).reshape(T, K, 3, H)
  v = (x @ weight(layer.value)).reshape(T, K, 3, V)
  gates = (x @ weight(layer.gate)).reshape(T, N, 3)
  gates = 1 / (1 + np.exp(-gates))

  def compress(block, compressor):
    embedding, inner, outer = (
      np.asarray(w[...], np.float64)
      for w in (compressor.embedding, compressor.inner, compressor.outer)
    )
    return gelu((block + embedding).reshape(-1) @ inner) @ outer

  out = np.zeros((T, N, V))
  for t in range(T):
    for head in range(K):
      blocks = [slice(i, i + L) for i in range(0, t + 2 - L, d)]
      kc = [compress(k[b, head, 0], layer.compress_key) for b in blocks]
      vc = [compress(v[b, head, 0], layer.compress_value) for b in blocks]
      group = range(head * N // K, (head + 1) * N // K)
      importance = np.zeros(t // C + 1)
      for n in group:
        if not blocks:
          continue
        p = softmax(np.array(kc) @ q[t, n] / np.sqrt(H))
        out[t, n] += gates[t, n, 0] * (p @ np.array(vc))
        # A compressed block counts for each of its strides in a block.
        for weight_of, block in zip(p, blocks, strict=True):
          for stride in range(block.start, block.stop, d):
            importance[stride // C] += weight_of
      # The first block, its own, and the one that matters most.
      importance[[0, -1]] = np.inf
      chosen = np.argsort(-importance, kind='stable')[:top_n]
      selected = [s for s in range(t + 1) if s // C in chosen]
      recent = list(range(max(0, t + 1 - window), t + 1))
      for n in group:
        for branch, keys in ((1, selected), (2, recent)):
          p = softmax(k[keys, head, branch] @ q[t, n] / np.sqrt(H))
          out[t, n] += gates[t, n, branch] * (p @ v[keys, head, branch])
  return out.reshape(T, -1) @ weight(layer.out)


@pytest.mark.parametrize('T', [3, 21])
def test_nsa_is_what_its_parameters_say(T):
  layer = make_layer(tiny_layer('nsa'))
  x = make_input(T)
  expected = [nsa_by_hand(layer, row) for row in np.asarray(x, np.float64)]
  np.testing.assert_allclose(apply(layer, x), expected, **tolerance('float32'))


def test_compressed_keys_turn_with_the_positions_of_their_blocks():
  layer = make_layer(tiny_layer('nsa'), position_encoding='rope')
  x = make_input(21)
  # No values but those of the compressed branch.
  values = layer.value.kernel[...].reshape(D, K, 3, V)
  layer.value.kernel[...] = values.at[:, :, 1:].set(0).reshape(D, -1)
  at = lambda positions: apply(layer, x, positions=positions)
  natural = at(jnp.arange(21))
  # A rotation of queries and keys by one angle changes no product.
  shifted = at(jnp.arange(21) + 1000)
  np.testing.assert_allclose(shifted, natural, **tolerance('float32'))
  assert not np.allclose(at(2 * jnp.arange(21)), natural, atol=1e-3)


def test_moba_counts_what_it_keeps_and_does():
  layer = make_layer('moba(block_size=4, top_k=2)')
  # All tokens, five means, and what the next mean is made of.
  kept = 21 * (H + V) + 5 * H + 3 * H
  assert layer.state_bytes(21, 'float32') == 4 * K * kept
  before = [t // 4 for t in range(21)]
  pairs = [min(n, 1) * 4 + t % 4 + 1 for t, n in enumerate(before)]
  mixing = 2 * N * ((H + V) * sum(pairs) + H * sum(before)) + 21 * K * H
  assert layer.mixing_flops(21) == mixing
  projections = D * (N * H + K * H + K * V) + N * V * D
  assert layer.flops(21) == mixing + 2 * 21 * projections


def test_nsa_counts_what_it_keeps_and_does():
  layer = make_layer(tiny_layer('nsa'))
  # All tokens to select, the window, the compressed ones in float32, and what
  # the next one is made of.
  kept = 2 * (21 + 3) + 4 * 9 + 2 * 3
  assert layer.state_bytes(21, 'bfloat16') == kept * K * (H + V)
  compressed = [max(0, (t + 1 - 4) // 2 + 1) for t in range(21)]
  selected = [min(t // 4, 2) * 4 + t % 4 + 1 for t in range(21)]
  window = [min(t + 1, 3) for t in range(21)]
  pairs = sum(compressed) + sum(selected) + sum(window)
  hidden = sum(4 * width * 2 * width + 2 * width * width for width in (H, V))
  mixing = 2 * (N * (H + V) * pairs + 9 * K * hidden)
  assert layer.mixing_flops(21) == mixing
  projections = D * (N * H + 3 * K * (H + V) + 3 * N) + N * V * D
  assert layer.flops(21) == mixing + 2 * 21 * projections


def test_costs_grow_as_learned_sparsity_says():
  full, moba, nsa = (make_layer(name) for name in ('full', 'moba', 'nsa'))
  T = 2**17
  assert moba.mixing_flops(T) < full.mixing_flops(T) / 40
  assert nsa.mixing_flops(T) < full.mixing_flops(T) / 10
  # Sparse in what it reads, not in what it keeps.
  for layer in (moba, nsa):
    assert layer.state_bytes(T, 'float32') >= full.state_bytes(T, 'float32')


@pytest.mark.parametrize(
  ('layer', 'error', 'message'),
  [
    ('moba(block_size=0)', ValueError, 'block_size=0'),
    ('moba(top_k=0)', ValueError, 'top_k=0'),
    ('nsa(stride=5)', ValueError, 'stride=5 must divide'),
    ('nsa(top_n=2)', ValueError, 'top_n=2'),
    ('nsa(window=0)', ValueError, 'window=0'),
    ("nsa(position_encoding='alibi')", NotImplementedError, 'no one distance'),
    (
      'nsa(attention_dropout=0.1)',
      NotImplementedError,
      'drawn by the position',
    ),
  ],
)
def test_what_does_not_fit_is_refused(layer, error, message):
  with pytest.raises(error, match=message):
    make_layer(layer)
