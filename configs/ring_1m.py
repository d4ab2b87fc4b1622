r"""Exact attention over 1,048,576 tokens, spread over a mesh.

Ring Attention (arXiv:2310.01889) in zigzag layout, one full layer at least. The
argument names the size: without one it is `pod` where there are accelerators
and `laptop` where there are not, and the first line of the output says which.

  python train.py --config=configs/ring_1m.py            # picks
  python train.py --config=configs/ring_1m.py:laptop     # 8 virtual devices
  python train.py --config=configs/ring_1m.py:hybrid     # window + linear
  python train.py --config=configs/ring_1m.py:pod --coordinator=auto
  python train.py --config=configs/ring_1m.py:sibling    # 2,048 tokens

`laptop` and `hybrid` are for a machine without accelerators: the same 1,048,576
tokens, one narrow head, one step. `sibling` is their shape at a length at which
several processes train in seconds.

Published models of this kind have gated MLPs, of as many parameters at `pod`
with --config.model.mlp=swiglu --config.model.mlp_dim=2736.

Expected: docs/results.md, 'A million tokens on a mesh', has what a step takes.
"""

from ml_collections import ConfigDict

from configs import default
from longctx import parallel, tasks

TOKENS = 2**20

# Devices of a v5p slice of 128 chips: 4 copies of a ring of 32.
POD = dict(data=4, seq=32, model=1)


def get_config(size: str = '') -> ConfigDict:
  size = size or ('pod' if parallel.has_accelerator() else 'laptop')
  sizes = {
    'laptop': _laptop,
    'hybrid': _hybrid,
    'pod': _pod,
    'sibling': _sibling,
  }
  if size not in sizes:
    raise ValueError(f'unknown {size=}; known: {", ".join(sizes)}')
  print(f'ring_1m: {size}')
  config = default.get_config('passkey')
  config.task = ConfigDict(
    tasks.task_defaults('passkey', seq_len=TOKENS, vocab_size=64)
  )
  config.parallel.layout = 'zigzag'
  config.parallel.scheme = 'ring'
  config.model.position_encoding = 'none'
  config.model.short_conv = 4
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 100
  sizes[size](config)
  return config


def _pod(config: ConfigDict):
  config.parallel.update(POD)
  config.parallel.fsdp = True
  config.batch_size = 4
  config.steps = 10_000
  config.model.layers = ('sliding_window(window=1024)',) * 6 + ('full',) * 2
  config.model.d_model = 1024
  config.model.num_heads = 8
  config.model.num_kv_heads = 2
  config.model.mlp_dim = 4096
  config.model.dtype = 'bfloat16'
  config.model.remat = 'dots_no_batch'


def _laptop(config: ConfigDict):
  config.parallel.seq = 8
  config.batch_size = 1
  config.steps = 1
  # On CPUs XLA keeps some KB for each block of scores until the step ends, so
  # fewer and larger blocks take less memory.
  config.model.layers = (
    'sliding_window(window=256)',
    'full(block_q=2048, block_k=1024)',
  )
  config.model.d_model = 32
  config.model.num_heads = 1
  config.model.head_dim = 16
  # Nothing but the step: a validation at this length is another minute.
  config.eval.batches = 1
  config.eval.test_batches = 1
  config.log.every = 1


def _hybrid(config: ConfigDict):
  _laptop(config)
  config.steps = 4
  config.model.layers = ('sliding_window(window=256)', 'linear')


def _sibling(config: ConfigDict):
  _laptop(config)
  config.task.seq_len = 2048
  config.parallel.seq = 4
  config.batch_size = 2
  config.steps = 20
