# %% [markdown]
# # Ring attention on eight virtual devices
#
# Ring attention splits a sequence over devices: each keeps its queries, and
# keys and values travel around the ring. Here the eight devices are virtual
# ones of the CPU: results are those of real ones, the speed is not.

# %%
import jax
import numpy as np
from matplotlib import pyplot as plt

import longctx as lc
from longctx.costs.attention import hop_blocks, wire_bytes
from longctx.parallel.layout import SequenceLayout

lc.parallel.ensure_devices(8)
mesh = lc.parallel.make_mesh(seq=8)
print(mesh)

# %% [markdown]
# ## The same numbers
#
# The call takes global arrays, and says where to run.

# %%
T, N, H = 256, 2, 8
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, T, N, H))
window = lc.masks.SlidingWindow(31)
here = lc.dot_product_attention(q, k, v, mask=window)
there = lc.parallel.dot_product_attention(
  q, k, v, mask=window, mesh=mesh, scheme='ring', layout='zigzag'
)
print(f'largest difference {np.abs(here - there).max():.1e}')

# %% [markdown]
# ## Who computes how much
#
# Under a causal mask late queries read more keys than early ones. In the
# contiguous layout the last device computes most; zigzag gives each device a
# piece from either end. The counts are exact, and nothing runs.

# %%
figure, ax = plt.subplots(figsize=(5, 3))
for i, layout in enumerate(('contiguous', 'zigzag', 'striped')):
  blocks = hop_blocks(
    lc.masks.Causal(), SequenceLayout(layout, 8 * 1024, 8), 64, 64
  ).total
  ax.bar(np.arange(8) + 0.27 * (i - 1), blocks, 0.25, label=layout)
  print(f'{layout:<11} busiest / mean {blocks.max() / blocks.mean():.2f}')
ax.set_xlabel('device')
ax.set_ylabel('blocks of 64 × 64 scores')
ax.legend()
# %% [markdown]
# ## What is sent
#
# A ring stops where the mask does: a window needs a neighbour's keys and no
# more. Ulysses trades heads for tokens, all_gather sends everything.

# %%
masks = {'causal': lc.masks.Causal(), 'window of 32': window}
for name, mask in masks.items():
  for scheme in ('ring', 'all_gather'):
    sent = wire_bytes(
      scheme, 1, 8, 8, 64, mesh=mesh, mask=mask,
      layout=SequenceLayout('contiguous', 8 * 1024, 8),
    )  # fmt: skip
    print(f'{name:<13} {scheme:<11} {sum(sent.values()) / 1e6:7.1f} MB')

# %% [markdown]
# ## A recurrence on the ring
#
# Linear attention sends its state, whose size does not depend on the length.

# %%
here, _ = lc.linear_attention(q, k, v)
there, _ = lc.parallel.linear_attention(q, k, v, mesh=mesh)
print(f'largest difference {np.abs(here - there).max():.1e}')
