# %% [markdown]
# # Your own attention variant
#
# An attention variant is one class: it sets a `mask` or a `recurrence`. Costs,
# KV caches, decoding and meshes follow from that. Here are one of each, checked
# and put to use without changing a file of the library.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import pyplot as plt

import longctx as lc
from longctx.analysis import leak_probe
from longctx.attention import Attention
from longctx.attention.base import make_linear
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.recurrence import Recurrence

# %% [markdown]
# ## A mask
#
# The last eight tokens, and before that every fourth one. Masks combine with
# `&` and `|`; a picture shows what a query (row) may read (columns).


# %%
class WindowAndSteps(Attention):
  """Softmax over the last 8 tokens, and every 4th as far as 28 back."""

  steps = lc.masks.Dilated(window=8, dilation=4)
  mask = lc.masks.Causal() & (lc.masks.SlidingWindow(7) | steps)


lc.VARIANTS['window_and_steps'] = WindowAndSteps
layer = lc.Attention(
  'window_and_steps', d_model=16, num_heads=2, rngs=nnx.Rngs(0)
)
plt.figure(figsize=(3, 3))
plt.imshow(layer.mask.dense(48, 48), cmap='Blues')
plt.xlabel('key')
plt.ylabel('query')
print('pairs', layer.mask.num_allowed(48, 48), 'of', 48**2)
print('FLOPs of a row', layer.flops(48))
print('bytes that decoding keeps', layer.state_bytes(10_000, 'bfloat16'))

# %% [markdown]
# What an output reads is proven by gradients: nothing that the mask forbids.

# %%
x = jax.random.normal(jax.random.key(0), (1, 48, 16))
read = leak_probe.reads(layer, x)
print('leaks:', leak_probe.leaks(read, layer.mask.dense(48, 48)))

# %% [markdown]
# ## A recurrence
#
# A state per head that fades by a learned gate:
# S_t = σ(w x_t) S_{t-1} + k_t v_tᵀ. What the state cannot do, it lists in
# `unsupported`, with reasons; a config that asks for it is refused.


# %%
class Fading(Attention):
  """S_t = σ(w x_t) S_{t-1} + k_t v_tᵀ; out_t = q_t S_t / √H."""

  unsupported = OF_RECURRENCES

  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.fade = make_linear(config, config.d_model, config.num_heads, rngs=rngs)
    self.recurrence = Recurrence.of(config, scale=config.head_dim**-0.5)

  def attend(self, qkv, context):
    q, k, v, x = qkv
    log_decay = jax.nn.log_sigmoid(self.fade(x))
    return context.recurrence(self.recurrence, q, k, v, log_decay=log_decay)


lc.VARIANTS['fading'] = Fading
try:
  lc.Attention(
    'fading', d_model=16, num_heads=2, attention_dropout=0.1, rngs=nnx.Rngs(0)
  )
except NotImplementedError as error:
  print(error)

# %% [markdown]
# ## In a model
#
# A layer stack is a tuple of names, and any stack decodes.

# %%
model = lc.Transformer(
  lc.TransformerConfig(
    vocab_size=32,
    layers=('window_and_steps', 'fading'),
    d_model=16,
    num_heads=2,
  ),
  rngs=nnx.Rngs(0),
)
tokens = jnp.arange(12)[None] % 32
whole = model(tokens).argmax(-1)[0, -1]
generator = lc.Generator(model, chunk=12)
prompts = lc.Prompts.of([np.asarray(tokens[0])])
(written,) = generator.generate(
  prompts, jax.random.key(0), max_new=4, at_once=4
)
print('first token by the whole row', int(whole), 'and by the cache', written)
