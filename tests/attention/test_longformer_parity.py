"""Longformer equals the one of Hugging Face, with its weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.attention import AttentionConfig, make_attention

LONGFORMER = 'transformers.models.longformer'
B, T, D, N = 2, 24, 16, 4


def make_pair(window, num_global):
  """A LongformerSelfAttention with random weights, and ours with the same.

  Ours has the identity in place of the projection back, which is a module of
  its own there.
  """
  torch = pytest.importorskip('torch')
  longformer = pytest.importorskip(f'{LONGFORMER}.modeling_longformer')
  config = longformer.LongformerConfig(
    hidden_size=D,
    num_attention_heads=N,
    attention_window=[window],
    attention_probs_dropout_prob=0.0,
  )
  torch.manual_seed(0)
  theirs = longformer.LongformerSelfAttention(config, layer_id=0).eval()
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, std=0.5)
  shared = AttentionConfig(
    d_model=D,
    num_heads=N,
    num_kv_heads=N,
    head_dim=D // N,
    value_dim=D // N,
    position_encoding='none',
  )
  ours = make_attention(
    f'longformer(window={window // 2 + 1}, num_global={num_global}, '
    'global_projections=True, causal=False, use_bias=True)',
    shared,
    rngs=nnx.Rngs(0),
  )
  ours.load_hugging_face(
    {name: x.numpy() for name, x in theirs.state_dict().items()}
  )
  ours.out.kernel[...] = jnp.eye(D)
  return theirs, ours


@pytest.mark.parametrize(
  ('window', 'num_global'), [(4, 1), (4, 3), (8, 5), (12, 2)]
)
def test_outputs_equal_those_of_hugging_face(window, num_global):
  torch = pytest.importorskip('torch')
  theirs, ours = make_pair(window, num_global)
  x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
  is_global = torch.zeros(B, T, dtype=torch.bool)
  is_global[:, :num_global] = True
  with torch.no_grad():
    (expected,) = theirs(
      torch.from_numpy(x),
      attention_mask=10000.0 * is_global,
      is_index_masked=torch.zeros(B, T, dtype=torch.bool),
      is_index_global_attn=is_global,
      is_global_attn=True,
    )
  found = ours(jnp.asarray(x))
  np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)
