# %% [markdown]
# # Recall in five minutes
#
# Associative recall: a context holds key-value pairs, and a question asks for
# the value of one key. Softmax attention keeps every key and value (a KV
# cache); linear attention keeps one matrix, in which pairs get into each
# other's way. This notebook shows it twice: without training, and trained.

# %%
import jax
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt

import longctx as lc
from longctx.analysis import capacity
from longctx.ops.recurrence.feature_maps import make_feature_map

# %% [markdown]
# ## Without training
#
# Random unit keys of 16 channels are written, and each is asked for once.
# Three memories: every key and value, the sum of k vᵀ, and the delta rule,
# which replaces what it held for a key.

# %%
memories = {
  'softmax': capacity.softmax_memory(scale=16.0),
  'linear': capacity.linear_memory(make_feature_map('identity')),
  'delta rule': capacity.delta_memory(),
}
pairs = [4, 16, 32]
for name, memory in memories.items():
  found = [
    capacity.accuracy(memory, num_pairs=n, key_dim=16, value_dim=16, trials=32)
    for n in pairs
  ]
  print(f'{name:<12}', *(f'{accuracy:.2f}' for accuracy in found))
  plt.plot(pairs, found, label=name, marker='o')
plt.gcf().set_size_inches(5, 3)
plt.xscale('log', base=2)
plt.xlabel('pairs in the context')
plt.ylabel('answered')
plt.legend()
# %% [markdown]
# ## Trained
#
# The task is MQAR ([Zoology](https://arxiv.org/abs/2312.04927)). An example is
# made from (seed, split, index), the same on every machine.

# %%
task = lc.make_task('mqar', seq_len=16, vocab_size=32, num_pairs=4)
example = task.get(seed=0, split='train', index=7)
print('tokens ', example.tokens)
print('labels ', np.where(example.weights > 0, example.labels, -1))

# %% [markdown]
# A model is a pattern of layers, and its loss is a sum over the scored tokens.
# The training loop is yours, or `lc.train`. Here are 100 steps of one layer
# with heads of four channels; `make train` is the comparison at full length.


# %%
def train(layer, steps=100, batch_size=32):
  config = lc.TransformerConfig(
    vocab_size=task.vocab_size,
    layers=(layer,),
    d_model=32,
    num_heads=1,
    head_dim=4,
    value_dim=4,
    short_conv=3,
    position_encoding='none',
  )
  graph, params = nnx.split(lc.Transformer(config, rngs=nnx.Rngs(0)))
  optimizer = optax.adam(1e-2)

  @jax.jit
  def update(params, state, *batch):
    def loss(params):
      sums = nnx.merge(graph, params).loss(*batch)
      return sums['loss'] / sums['weight'], sums['correct'] / sums['weight']

    gradients, accuracy = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, accuracy

  state, accuracies = optimizer.init(params), []
  for step in range(steps):
    rows = range(step * batch_size, (step + 1) * batch_size)
    examples = [task.get(seed=0, split='train', index=row) for row in rows]
    batch = (
      np.stack([getattr(example, name) for example in examples])
      for name in ('tokens', 'labels', 'weights')
    )
    params, state, accuracy = update(params, state, *batch)
    accuracies.append(float(accuracy))
  return accuracies


plt.figure(figsize=(5, 3))
for layer in ('full', 'linear'):
  accuracies = train(layer)
  print(f'{layer:<7} answered at the end {np.mean(accuracies[-5:]):.2f}')
  plt.plot(accuracies, label=layer)
plt.xlabel('step')
plt.ylabel('answered')
plt.legend()
