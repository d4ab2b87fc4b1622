r"""System 2 Attention: answer where opinions contradict the facts.

Runs on `tasks.opinions`. `rewriter` learns two instructions, to write the
context anew and to answer, and does one after the other
(longctx/evaluation/rewrite.py). `gate` learns to answer with a hard gate on its
context (longctx/models/gate.py), from
what is relevant; `gate_answers` from the answers alone; `window` is the gate's
model without one.

  python train.py --config=configs/s2a.py
  python train.py --config=configs/s2a.py:gate
  python eval.py s2a --workdir=runs/s2a --distractors=0,8,64,256

Paper: Weston and Sukhbaatar, 2023 (arXiv:2311.11829). What comes out is in
studies/s2a.

Expected: against a wrong opinion the plain model answers 3% (two to 15), S2A
98%, the gate all of 8 distractors' questions; see studies/s2a.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(only: str = '') -> ConfigDict:
  config = default.get_config('opinions')
  task = config.task
  task.seq_len = 112
  task.num_topics = 32
  task.num_mentions = 3
  task.num_opinions = 3
  task.agree = 0.95
  task.neutral = 0.02
  task.condition = 'train'
  task.instruction = 'train'

  config.model.layers = ('full', 'full')
  config.model.d_model = 64
  config.model.num_heads = 4
  config.model.mlp_dim = 128
  config.model.short_conv = 4
  config.model.position_encoding = 'none'

  config.steps = 1000
  config.batch_size = 64
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.1
  config.eval.every = 250
  config.checkpoint.every = 0

  # Units of four tokens are read where they stand; what is asked for is one
  # unit, or a few.
  answers = {
    'instruction': 'answer',
    'rewrite': 0.0,
    'neutral': 0.0,
    'num_facts': 32,
    'seq_len': 224,
  }
  windows = ('sliding_window(window=8)', 'sliding_window(window=32)')
  gate = {'keep': 4, 'span': 4, 'question': 4}
  runs = {
    'rewriter': {},
    'gate': {
      'task': answers,
      'model': {'layers': windows, 'gate': {**gate, 'threshold': 0.5}},
    },
    'gate_answers': {
      'steps': 500,
      'task': answers,
      'model': {
        'layers': windows,
        'gate': {**gate, 'labels': 0.0, 'noise': 1.0},
      },
    },
    'window': {'steps': 300, 'task': answers, 'model': {'layers': windows}},
  }
  if only and only not in runs:
    raise ValueError(f'unknown run {only!r}; known: {", ".join(runs)}')
  config.runs = ConfigDict({only: runs[only]} if only else runs)
  return config
