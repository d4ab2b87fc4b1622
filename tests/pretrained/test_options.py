"""Config options: as published configs and older ones of each family say them.

published.json has configs of well-known checkpoints, long factors all made 1.
"""

import dataclasses
import json
import pathlib

import pytest

from longctx.pretrained.families import Options, family_of

PUBLISHED = json.loads(
  pathlib.Path(__file__).with_name('published.json').read_text()
)
LONG = dict(long_factor=[2.0] * 8, short_factor=[1.0] * 8)
SMALL = dict(
  vocab_size=32,
  hidden_size=64,
  num_attention_heads=4,
  num_hidden_layers=6,
  intermediate_size=32,
  max_position_embeddings=64,
)


def read(model_type, **options):
  return family_of(model_type).read(Options(options, model_type))


# What is easily got wrong: fields of a config, and its first and last layer.
WINDOW = 'sliding_window(window={})'
LOCAL = 'sliding_window(window=512, rope_base=10000.0)'
MEANING = {
  'Llama-3.2-1B': (
    dict(head_dim=64, tied_head=True, rope_base=5e5),
    'full',
    'full',
  ),
  'Llama-3.1-8B-Instruct': (
    dict(rope_scaling='llama3(factor=8.0, original_context=8192)'),
    'full',
    'full',
  ),
  'SmolLM2-135M': (dict(num_kv_heads=3, rope_base=1e5), 'full', 'full'),
  'Mistral-7B-v0.3': (dict(head_dim=128, num_kv_heads=8), 'full', 'full'),
  'Mistral-7B-v0.1': (
    dict(tied_head=False),
    WINDOW.format(4096),
    WINDOW.format(4096),
  ),
  'Qwen2.5-0.5B': (dict(qkv_bias=True, out_bias=False), 'full', 'full'),
  'Qwen3-0.6B': (dict(head_dim=128, qk_norm='head'), 'full', 'full'),
  'gemma-2-2b': (
    dict(tied_head=True, attention_soft_cap=50.0, logits_soft_cap=30.0),
    WINDOW.format(4096),
    'full',
  ),
  'gemma-3-1b-it': (
    dict(tied_head=True, mlp='geglu', attention_soft_cap=None),
    LOCAL,
    LOCAL,
  ),
  'gemma-3-270m': (dict(rope_base=1e6, logits_soft_cap=None), LOCAL, 'full'),
  'OLMo-2-0425-1B': (
    dict(qk_norm='width', norm_position='after'),
    'full',
    'full',
  ),
  'Phi-3-mini-4k-instruct': (
    dict(rope_scaling='none', rotary_dim=None),
    WINDOW.format(2047),
    WINDOW.format(2047),
  ),
  'Phi-3-mini-128k-instruct': (
    dict(head_dim=96),
    WINDOW.format(262144),
    WINDOW.format(262144),
  ),
  'Phi-4-mini-instruct': (
    dict(rotary_dim=96, head_dim=128, tied_head=True),
    WINDOW.format(262144),
    WINDOW.format(262144),
  ),
  'gpt2': (dict(mlp='gelu', mlp_dim=3072, tied_head=True), 'full', 'full'),
  'gpt2-medium': (dict(d_model=1024), 'full', 'full'),
  'distilgpt2': (dict(max_positions=1024), 'full', 'full'),
  'pythia-70m': (
    dict(rotary_dim=16, mlp='gelu_exact', tied_head=False),
    'full',
    'full',
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configs_are_read_with_their_meaning(name):
  options = PUBLISHED[name]
  found = read(**options)
  fields, first, last = MEANING[name]
  assert {key: getattr(found, key) for key in fields} == fields
  assert (found.layers[0], found.layers[-1]) == (first, last)


@pytest.mark.parametrize('kind', ['su', 'longrope'])
def test_the_original_context_beside_a_scaling_is_its_own(kind):
  # transformers: √(1 + log(64 / 16) / log 16), whatever the dict says.
  rope = {'type': kind, 'rope_type': None, **LONG}
  found = read(
    'phi3', **SMALL, original_max_position_embeddings=16, rope_scaling=rope
  ).rope.scaling
  assert (found.original_context, found.context) == (16, 64)
  assert found.amplitude == pytest.approx(1.5**0.5)


def test_a_factor_of_longrope_is_its_amplitude():
  rope = {'type': 'longrope', 'factor': 2.0, **LONG}
  found = read(
    'phi3', **SMALL, original_max_position_embeddings=16, rope_scaling=rope
  ).rope.scaling
  assert found.amplitude == pytest.approx(1.25**0.5)


@pytest.mark.parametrize(
  ('rope', 'full', 'local'),
  [
    (
      dict(
        rope_scaling={'rope_type': 'linear', 'factor': 8.0},
        rope_theta=5e5,
        rope_local_base_freq=5e3,
      ),
      (5e5, 'linear(factor=8.0)'),
      ", rope_base=5000.0, rope_scaling='none'",
    ),
    (
      dict(rope_parameters={'full_attention': {'rope_theta': 5e5}}),
      (5e5, 'none'),
      ', rope_base=10000.0',
    ),
    (
      dict(
        rope_parameters={
          'full_attention': None,
          'sliding_attention': {'rope_type': 'default'},
        },
        rope_local_base_freq=7e3,
      ),
      (1e6, 'none'),
      ', rope_base=7000.0',
    ),
    (
      dict(rope_parameters={'rope_theta': 5e5}),
      (5e5, 'none'),
      ', rope_base=10000.0',
    ),
  ],
)
def test_windows_of_gemma_3_keep_a_rope_of_their_own(rope, full, local):
  found = read('gemma3_text', **SMALL, sliding_window=8, **rope)
  assert (found.rope_base, found.rope_scaling) == full
  assert found.layers[0] == f'sliding_window(window=8{local})'
  assert found.layers[-1] == 'full'


@pytest.mark.parametrize(
  ('family', 'absent', 'null'),
  [
    ('llama', 4, 4),
    ('mistral', 8, 64),
    ('qwen2', 32, 64),
    ('qwen3', 32, 64),
    ('gemma2', 4, 64),
  ],
)
def test_key_heads_left_out_are_as_many_as_the_family_has(family, absent, null):
  small = SMALL
  if family != 'llama':
    small = {**SMALL, 'hidden_size': 128, 'num_attention_heads': 64}
  assert read(family, **small).num_kv_heads == absent
  assert read(family, **small, num_key_value_heads=None).num_kv_heads == null


@pytest.mark.parametrize(
  ('family', 'options', 'message'),
  [
    (
      'llama',
      dict(
        rope_parameters={'rope_type': 'linear', 'factor': 2.0},
        rope_scaling={'type': 'linear', 'factor': 4.0},
      ),
      'two scalings of RoPE',
    ),
    ('llama', dict(rope_scaling='linear'), "rope_scaling='linear'"),
    (
      'phi3',
      dict(rope_scaling={'type': 'linear', 'factor': 4.0}),
      'no scaling but longrope',
    ),
    (
      'gemma3_text',
      dict(rope_parameters={'chunked_attention': {}}),
      'chunked_attention',
    ),
    ('phi3', dict(full_attn_mod=2), 'full_attn_mod=2'),
  ],
)
def test_what_is_ambiguous_is_refused(family, options, message):
  with pytest.raises(ValueError, match=message):
    read(family, **SMALL, **options)


@pytest.mark.parametrize(
  'scaling',
  [
    'yarn(factor=4.0, original_context=16)',
    'llama3(factor=4.0, original_context=16)',
  ],
)
@pytest.mark.parametrize('model_type', ['llama', 'gpt_neox'])
def test_a_scaled_config_says_how_far_it_reaches(model_type, scaling):
  family = family_of(model_type)
  config = dataclasses.replace(read(model_type, **SMALL), rope_scaling=scaling)
  options = family.write(config)
  assert options['max_position_embeddings'] == 64
  assert family.read(Options(options, model_type)) == config
