"""The copy task of 'Transformers are RNNs', with linear or softmax attention.

A string of ten symbols, a separator, the string again, at most 128 tokens. Four
layers, eight heads, batch 64, RAdam, the learning rate down from 1e-3 to 1e-4
after 3,000 updates: Katharopoulos et al., 2020 (arXiv:2006.16236), figure 2,
where linear attention (elu + 1) converges to softmax's loss. The paper gives no
width; 8 x 16 = 128 here, an MLP of four times that, learned positions.

  python train.py --config=configs/copying.py            # linear
  python train.py --config=configs/copying.py:full       # softmax
  python eval.py --workdir=runs/copying

Expected: no figure has been measured for this config yet. Published: linear
attention's loss ends where softmax's does.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = 'linear') -> ConfigDict:
  config = default.get_config('copying')
  config.task.seq_len = 128
  config.task.num_symbols = 10

  config.model.layers = (variant,) * 4
  config.model.d_model = 128
  config.model.num_heads = 8
  config.model.mlp_dim = 512
  config.model.position_encoding = 'learned'

  config.steps = 5000
  config.batch_size = 64
  config.optimizer.name = 'radam'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.0
  config.optimizer.schedule = 'step'
  config.optimizer.step_at = 3000
  config.optimizer.final_factor = 0.1

  config.eval.every = 250
  return config
