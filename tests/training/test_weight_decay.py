"""Weight decay reaches the matrices of every variant, and nothing else."""

import jax
import pytest
from flax import nnx

from longctx.attention import VARIANTS, AttentionConfig, make_attention
from longctx.training.optimizer import decay_mask, muon_axes
from tests.tiny import tiny_layer

SHARED = {f'{name}/kernel' for name in ('query', 'key', 'value', 'out')}
CONVOLVED = {'query_conv', 'key_conv', 'value_conv'}
DELTA = {'dt_bias', 'log_rate', 'norm_scale'}
LOW_RANK = {'gate_down/kernel', 'gate_up/kernel'}
DECAYS = {'decay_down/kernel', 'decay_up/kernel'}
GLOBAL = {f'{name}_global/kernel' for name in ('query', 'key', 'value')}
COMPRESS = {
  f'compress_{x}/{y}' for x in ('key', 'value') for y in ('inner', 'outer')
}
FEATURES = ('query_features/parameters', 'key_features/parameters')

# Layer -> what decays besides the projections, and what does not besides the
# taps of convolutions. A name alone has the variant's small arguments.
TABLE = {
  'based': (set(), set()),
  'bigbird': (set(), set()),
  'block_sparse': (set(), set()),
  'deltanet': ({'beta/kernel'}, {'norm_scale'}),
  'differential': (set(), {'head_norm/scale', 'lambda_k', 'lambda_q'}),
  'dilated': (set(), set()),
  'forgetting': ({'forget/kernel'}, {'forget/bias'}),
  'full': (set(), set()),
  'gated_deltanet': ({'beta/kernel', 'dt/kernel', 'gate/kernel'}, DELTA),
  'gla': (DECAYS | {'gate/kernel'}, {'decay_up/bias'}),
  'kda': (DECAYS | LOW_RANK | {'beta/kernel'}, DELTA | {'gate_up/bias'}),
  'lightning': (LOW_RANK, set()),
  'linear': (set(), set()),
  'longformer': (GLOBAL, set()),
  'mamba2': ({'dt/kernel', 'gate/kernel'}, DELTA | {'skip'}),
  'moba': (set(), set()),
  'nsa': (
    {'gate/kernel', *COMPRESS},
    {'compress_key/embedding', 'compress_value/embedding'},
  ),
  'output_gate': ({'gate/kernel'}, set()),
  'retention': ({'gate/kernel'}, set()),
  'scalable_softmax': (set(), {'logit_scale'}),
  'sigmoid': (set(), set()),
  'sink_logits': (set(), {'sink_logits'}),
  'sink_token': (set(), {'sink_key', 'sink_value'}),
  'sliding_window': (set(), set()),
  'softmax1': (set(), set()),
  'softpick': (set(), set()),
  'streaming': (set(), set()),
  'window_linear': (set(), {'mix_logit'}),
  "linear(feature_map='hedgehog')": (
    {f'{name}/kernel' for name in FEATURES},
    {f'{name}/bias' for name in FEATURES},
  ),
  'sigmoid(learned_bias=True)': (set(), {'logit_bias'}),
  'longformer(use_bias=True)': (
    set(),
    {'query/bias', 'key/bias', 'value/bias'},
  ),
}


def names(tree):
  """The paths of a tree's leaves with these."""
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: not isinstance(x, dict)
  )
  return {'/'.join(key.key for key in path): x for path, x in leaves}


@pytest.mark.parametrize('layer', TABLE)
def test_what_decays_is_as_the_table_has_it(layer):
  text = tiny_layer(layer) if layer in VARIANTS else layer
  config = AttentionConfig(d_model=16, num_heads=2, short_conv=2)
  made = nnx.eval_shape(lambda: make_attention(text, config, rngs=nnx.Rngs(0)))
  params = nnx.to_pure_dict(nnx.state(made, nnx.Param))
  decays, rests = TABLE[layer]
  found = names(decay_mask(params))
  assert {name for name, yes in found.items() if yes} == SHARED | decays
  assert {name for name, yes in found.items() if not yes} == CONVOLVED | rests
  # Muon's matrices are those that decay.
  muon = names(muon_axes(params))
  assert {name for name, x in muon.items() if x is not None} == SHARED | decays


def test_table_has_every_variant():
  # Pages that are tested beside add variants of their own.
  ours = (k for k, v in VARIANTS.items() if v.__module__.startswith('longctx.'))
  assert {*ours} <= {*TABLE}
