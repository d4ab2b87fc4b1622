"""SmolLM2-135M: fine-tuned, extended to longer contexts, or with other layers.

  python -m longctx.pretrained fetch smollm2
  python -m longctx.pretrained import smollm2 --workdir=runs/smollm2
  python train.py --config=configs/smollm2.py
  python train.py --config=configs/smollm2.py:extend
  python train.py --config=configs/smollm2.py:hybrid

The text is the Python standard library's own source on this machine;
--config.task.path=DIR reads any other. By the argument:

  finetune   the model as it is, on windows of 512 tokens;
  extend     8,192 -> 32,768 tokens by YaRN (arXiv:2309.00071), on windows of
             2,048: frequencies are those of 32,768 whatever is read. Lengthen
             them by --config.task.seq_len where memory allows;
  hybrid     of each three layers one stays, one becomes a window of 256 tokens
             and one Gated DeltaNet; these learn the outputs of the old layers
             first (arXiv:2410.10254), then all learn the text.

Expected: docs/pretrained.md has what was measured, of `finetune` and of YaRN
without training; `extend` and `hybrid` have not been trained at this size yet.
"""

from ml_collections import ConfigDict

from configs import default

LAYERS = 30
HYBRID = ('full', 'sliding_window(window=256)', 'gated_deltanet')


def get_config(variant: str = 'finetune') -> ConfigDict:
  if variant not in ('finetune', 'extend', 'hybrid'):
    raise ValueError(f'unknown {variant=}; known: finetune, extend, hybrid')
  config = default.get_config('text_lm')
  config.init_from = 'runs/smollm2'
  config.task.tokenizer = 'runs/smollm2/tokenizer'
  config.task.seq_len = 512
  config.task.packed = True

  model = config.model
  model.vocab_size = 49152
  model.d_model = 576
  model.num_heads = 9
  model.num_kv_heads = 3
  model.head_dim = 64
  model.layers = ('full',) * LAYERS
  model.mlp_dim = 1536
  model.mlp = 'swiglu'
  model.norm_eps = 1e-5
  model.rope_base = 100_000.0
  model.embedding_scale = 1.0
  model.logits_chunk = 256
  model.remat = 'dots'

  config.steps = 50
  config.batch_size = 2
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 5
  config.optimizer.weight_decay = 0.0
  config.eval.every = 25
  config.eval.batches = 4
  config.eval.test_batches = 8
  config.log.every = 5

  if variant == 'extend':
    model.rope_scaling = 'yarn(factor=4.0, original_context=8192)'
    config.task.seq_len = 2048
    config.batch_size = 1
  if variant == 'hybrid':
    model.layers = (HYBRID * LAYERS)[:LAYERS]
    config.transfer.steps = 100
    config.steps = 200
    config.optimizer.learning_rate = 3e-4
  return config
