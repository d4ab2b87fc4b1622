# %% [markdown]
# # Look inside a model: induction heads and attention sinks
#
# An induction head finds the previous occurrence of the current token and
# reads what came after it. This notebook trains one layer behind a short
# convolution to repeat permutations, finds the head, and removes it.

# %%
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import pyplot as plt

import longctx as lc
from longctx.analysis.maps import pooled_maps
from longctx.evaluation import sweep
from longctx.training.config import EvalConfig
from longctx.training.optimizer import OptimizerConfig

config = lc.ExperimentConfig(
  steps=150,
  batch_size=32,
  task=dict(
    name='induction', seq_len=32, vocab_size=24, min_period=12, max_period=16
  ),
  model=lc.TransformerConfig(
    layers=('full',), d_model=32, num_heads=2, short_conv=3, tied_head=False
  ),
  optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=20),
  eval=EvalConfig(every=0, batches=4, test_batches=4),
)
workdir = pathlib.Path(tempfile.mkdtemp())
(run,) = lc.prepare(config, workdir)
results = lc.train([run], workdir)

# %% [markdown]
# ## Scores of heads
#
# `Analyzer` measures every head: prefix matching (induction), the share that
# goes to the token before, and to the first token. A head that gives its first
# token more than 0.3 is called an attention sink.

# %%
(trained,) = sweep.open_workdir(workdir)
graph, params, step, _ = sweep.restore(trained)
analyzer = lc.Analyzer(graph, run.model, run.task, rows=8)
scores = analyzer.measure(params, step)
for name in ('prefix_matching', 'previous_token', 'first_token'):
  print(f'{name:<16}', np.round(scores[name][0], 2))
print(f'{"sink rate":<16}', np.round(scores['sink_rate'], 2))

# %% [markdown]
# ## Attention maps
#
# The second half of a row repeats the first, so an induction head draws a
# line of its own, half a row below the diagonal.

# %%
model = nnx.merge(graph, params)
(maps,) = pooled_maps(model, jnp.asarray(analyzer.batch['tokens'][:1]))
figure, axes = plt.subplots(1, 2, figsize=(6, 3))
for head, ax in enumerate(axes):
  ax.imshow(maps[0, head], cmap='Blues')
  ax.set_title(f'head {head}')
  ax.set_xlabel('key')
axes[0].set_ylabel('query')
# %% [markdown]
# ## Without a head
#
# A score is a name for a number. What accuracy loses without the head says
# whether the name is deserved.

# %%
ablation = analyzer.ablate(params, step)
print('accuracy of the model      ', ablation['accuracy'])
print('without each head          ', np.round(ablation['each'][0], 3))
print('without the induction heads', ablation['induction']['accuracy'])
