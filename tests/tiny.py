"""The smallest experiment that learns something, shared by several tests."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longctx import tasks
from longctx.attention import VARIANTS
from longctx.models.transformer import TransformerConfig
from longctx.tasks.tokenizer import Tokenizer
from longctx.training import config as config_lib
from longctx.training.config import ExperimentConfig


def tiny_config(**overrides) -> ExperimentConfig:
  """A 12-step run on two-pair recall; `overrides` as in a config's `runs`."""
  config = ExperimentConfig(
    steps=12,
    batch_size=8,
    task=tasks.task_defaults('mqar', seq_len=16, vocab_size=16, num_pairs=2),
    model=TransformerConfig(layers=('full',), d_model=16, num_heads=2),
    eval=config_lib.EvalConfig(every=6, batches=2, test_batches=2),
    checkpoint=config_lib.CheckpointConfig(every=5, keep=2),
    log=config_lib.LogConfig(every=4),
    runs={'tiny': overrides},
  )
  return config_lib.expand_runs(config)['tiny']


def tiny_layer(variant: str) -> str:
  """A layer of a variant whose structure shows within 20 tokens."""
  small = VARIANTS[variant].small
  arguments = ', '.join(f'{name}={value!r}' for name, value in small.items())
  return f'{variant}({arguments})'


def tiny_tokenizer(
  text: str, *, specials=('<eos>', '<bos>'), vocab_size=300, **fields
) -> Tokenizer:
  """Byte-level BPE that is trained on a text; its first special is EOS."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(specials),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator([text], trainer)
  return Tokenizer(backend=backend, **{'eos': 0, 'stops': (0,), **fields})
