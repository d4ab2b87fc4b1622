"""Leak probes: the causality of every variant and position encoding.

Each case probes the model from its embeddings to its last norm, twice: by
gradients, which must find exactly the pairs that the masks allow, and by
perturbation, which sees what gradients cannot (see analysis/leak_probe.py).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.analysis import leak_probe
from longctx.attention import VARIANTS
from longctx.attention.config import POSITION_ENCODINGS
from longctx.masks import Causal, PrefixColumns, SlidingWindow
from longctx.models.transformer import Transformer, TransformerConfig
from longctx.ops import dot_product_attention as dpa
from longctx.ops.recurrence import IMPLEMENTATIONS, linear_attention
from longctx.ops.recurrence.feature_maps import FEATURE_MAPS
from tests.tiny import tiny_layer

# Longer than two blocks, chunks or windows and a multiple of none.
T = 21
# Documents of one token and of several, and one that ends inside a chunk.
SEGMENTS = np.repeat([0, 1, 2, 3], [6, 1, 9, 5])

# Variant and positions that are refused, by name, when the model is made.
REFUSED = {
  (name, encoding)
  for name, variant in VARIANTS.items()
  for encoding in POSITION_ENCODINGS
  if encoding in variant.unsupported
}


def make_model(layers, *, position_encoding='rope', short_conv=0):
  """A small model in which no parameter is zero, so that no path hides."""
  config = TransformerConfig(
    vocab_size=11,
    layers=layers,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=8,
    position_encoding=position_encoding,
    max_positions=T,
    short_conv=short_conv,
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  leaves, treedef = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [
    leaf + 0.3 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  ]
  return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))


def model_pairs(model, short_conv, segment_ids):
  """What the model may read: per block the convolution, then the attention."""
  layers = []
  for block in model.blocks:
    # A state has all the past, whatever a mask beside it reads.
    attention = block.attention
    mask = attention.mask if attention.recurrence is None else Causal()
    if short_conv:
      taps = SlidingWindow(short_conv - 1)
      layers.append(leak_probe.allowed_pairs(taps, T, segment_ids))
    layers.append(leak_probe.allowed_pairs(mask, T, segment_ids))
  return leak_probe.reach(layers)


def assert_reads_exactly(fn, x, allowed, *, is_bound=False):
  """Or, where `allowed` is a bound, that nothing else is read."""
  read = leak_probe.reads(fn, x)
  assert leak_probe.leaks(read, allowed) == []
  assert is_bound or leak_probe.unread(read, allowed) == []
  # Rounding may swallow an influence here, but not make one.
  changed = leak_probe.changes(fn, x)
  assert leak_probe.leaks(changed, allowed) == []
  assert changed.diagonal().all()


@pytest.mark.parametrize(
  ('short_conv', 'packed'),
  [(0, False), (3, True)],
  ids=['alone', 'conv3-packed'],
)
@pytest.mark.parametrize(
  ('variant', 'position_encoding'),
  # Every other variant is probed as a layer, in tests/attention.
  sorted(
    set(itertools.product(('full', 'linear'), POSITION_ENCODINGS)) - REFUSED
  ),
)
def test_outputs_read_exactly_what_the_mask_allows(
  variant, position_encoding, short_conv, packed
):
  model = make_model(
    (tiny_layer(variant),),
    position_encoding=position_encoding,
    short_conv=short_conv,
  )
  segment_ids = SEGMENTS if packed else None
  ids = jnp.asarray(SEGMENTS)[None] if packed else None
  assert_reads_exactly(
    lambda x: model.hidden(x, segment_ids=ids),
    jax.random.normal(jax.random.key(2), (1, T, 16)),
    model_pairs(model, short_conv, segment_ids),
    is_bound=VARIANTS[variant].mask_is_bound,
  )


@pytest.mark.parametrize(('variant', 'position_encoding'), sorted(REFUSED))
def test_what_cannot_be_causal_is_refused_when_the_model_is_made(
  variant, position_encoding
):
  with pytest.raises(NotImplementedError):
    make_model((tiny_layer(variant),), position_encoding=position_encoding)


def test_a_stack_reads_exactly_what_its_layers_reach():
  model = make_model(
    ('sliding_window(window=3)', 'sliding_window(window=2)', 'linear')
  )
  windows = nnx.List(list(model.blocks)[:2])
  for blocks in (windows, model.blocks):
    model.blocks = blocks
    assert_reads_exactly(
      lambda x: model.hidden(x, segment_ids=jnp.asarray(SEGMENTS)[None]),
      jax.random.normal(jax.random.key(2), (1, T, 16)),
      model_pairs(model, 0, SEGMENTS),
    )


@pytest.mark.parametrize('feature_map', FEATURE_MAPS)
def test_no_feature_map_reads_ahead(feature_map):
  model = make_model((f'linear(chunk_size=8, feature_map={feature_map!r})',))
  allowed = model_pairs(model, 0, SEGMENTS)
  fn = lambda x: model.hidden(x, segment_ids=jnp.asarray(SEGMENTS)[None])
  x = jax.random.normal(jax.random.key(2), (1, T, 16))
  assert leak_probe.leaks(leak_probe.reads(fn, x), allowed) == []
  assert leak_probe.leaks(leak_probe.changes(fn, x), allowed) == []


def split_heads(x):
  """[B, T, 16] -> queries of two heads, keys and values of one, 4 wide."""
  q, k, v, _ = jnp.split(x, (8, 12, 16), axis=-1)
  return q.reshape(*q.shape[:2], 2, 4), k[:, :, None], v[:, :, None]


MASKS = {
  'causal': Causal(),
  'window': SlidingWindow(4),
  'around': SlidingWindow(3, 2),
  'sinks-window': Causal() & PrefixColumns(2) | SlidingWindow(1),
}


@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS.keys())
# cuDNN runs on GPUs alone.
@pytest.mark.parametrize(
  'implementation', sorted(set(dpa.IMPLEMENTATIONS) - {'cudnn'})
)
def test_attention_in_small_blocks_reads_exactly_its_mask(implementation, mask):
  ids = jnp.asarray(SEGMENTS)[None]
  # A kernel's smallest block is longer than the sequence.
  sizes = None
  if implementation != 'pallas':
    sizes = dpa.BlockSizes(8, 4, 4, 8)

  def fn(x):
    return dpa.dot_product_attention(
      *split_heads(x),
      mask=mask,
      q_segment_ids=ids,
      k_segment_ids=ids,
      block_sizes=sizes,
      implementation=implementation,
    )

  assert_reads_exactly(
    fn,
    jax.random.normal(jax.random.key(2), (1, T, 16)),
    leak_probe.allowed_pairs(mask, T, SEGMENTS, positions=np.arange(T)),
  )


@pytest.mark.parametrize('decay', [False, True], ids=['', 'decay'])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_linear_attention_in_chunks_reads_the_past_of_its_document(
  implementation, decay
):
  ids = jnp.asarray(SEGMENTS)[None]

  def fn(x):
    q, k, v = split_heads(x)
    out, _ = linear_attention(
      q,
      k,
      v,
      # A gate that depends on the input is one more path.
      log_decay=-jax.nn.softplus(q) if decay else None,
      segment_ids=ids,
      chunk_size=8,
      implementation=implementation,
    )
    return out

  assert_reads_exactly(
    fn,
    jax.random.normal(jax.random.key(2), (1, T, 16)),
    leak_probe.allowed_pairs(Causal(), T, SEGMENTS),
  )
