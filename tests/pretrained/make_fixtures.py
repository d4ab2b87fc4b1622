"""Makes the fixtures of the parity tests: tiny models of other people's code.

    pip install -e '.[parity]'
    python -m tests.pretrained.make_fixtures [SmolLM2-135M-Instruct.Q4_1.gguf]

Each is a random model of transformers, saved by it, and beside it tokens and
the logits that it gives them, in a float32 file: longer than its window and
than the context that its positions are scaled from.
"""

import json
import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).with_name('fixtures')

VOCABULARY, LENGTH = 24, 20
SHAPE = dict(
  vocab_size=VOCABULARY,
  hidden_size=16,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=32,
)
YARN = dict(
  rope_type='yarn',
  factor=4.0,
  original_max_position_embeddings=8,
  rope_theta=10_000.0,
)
LLAMA3 = dict(
  rope_type='llama3',
  factor=4.0,
  original_max_position_embeddings=8,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  rope_theta=10_000.0,
)
LINEAR = dict(rope_type='linear', factor=4.0, rope_theta=100_000.0)
LONGROPE = dict(
  rope_type='longrope',
  short_factor=[1.0, 1.1, 1.2],
  long_factor=[1.5, 2.0, 3.5],
  rope_theta=10_000.0,
  partial_rotary_factor=0.75,
)
WINDOWS = ['sliding_attention', 'full_attention']

# Name -> class of transformers, and its config.
CASES = {
  'llama': ('Llama', dict(SHAPE, head_dim=8, rms_norm_eps=1e-5)),
  'llama-tied': (
    'Llama',
    dict(
      SHAPE,
      tie_word_embeddings=True,
      rope_parameters=LLAMA3,
      attention_bias=True,
      mlp_bias=True,
    ),
  ),
  'mistral': ('Mistral', dict(SHAPE, head_dim=8, sliding_window=4)),
  'qwen2': (
    'Qwen2',
    dict(
      SHAPE,
      sliding_window=4,
      use_sliding_window=True,
      max_window_layers=1,
      rope_parameters=YARN,
    ),
  ),
  'qwen3': ('Qwen3', dict(SHAPE, head_dim=8, rope_parameters=YARN)),
  'olmo2': ('Olmo2', dict(SHAPE, head_dim=4)),
  'gemma2': (
    'Gemma2',
    dict(
      SHAPE,
      head_dim=8,
      sliding_window=4,
      query_pre_attn_scalar=12,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
    ),
  ),
  'gemma3': (
    'Gemma3',
    dict(
      SHAPE,
      head_dim=8,
      sliding_window=4,
      query_pre_attn_scalar=12,
      layer_types=WINDOWS,
      rope_parameters={
        'full_attention': LINEAR,
        'sliding_attention': dict(rope_type='default', rope_theta=10_000.0),
      },
    ),
  ),
  'phi3': (
    'Phi3',
    dict(
      SHAPE,
      num_attention_heads=2,
      sliding_window=6,
      original_max_position_embeddings=8,
      rope_parameters=LONGROPE,
      pad_token_id=0,
    ),
  ),
  'gpt2': (
    'GPT2',
    dict(vocab_size=VOCABULARY, n_embd=16, n_head=4, n_layer=2, n_positions=32),
  ),
  'gpt_neox': (
    'GPTNeoX',
    dict(
      vocab_size=VOCABULARY,
      hidden_size=32,
      intermediate_size=20,
      num_hidden_layers=2,
      num_attention_heads=4,
      max_position_embeddings=32,
      rope_parameters=dict(
        rope_type='default', rope_theta=10_000.0, partial_rotary_factor=0.25
      ),
    ),
  ),
}


def make_model(name: str):
  """The model of a case, all its parameters moved away from 0 and 1."""
  import torch
  import transformers

  kind, options = CASES[name]
  prefix = 'Gemma3Text' if kind == 'Gemma3' else kind
  config = getattr(transformers, f'{prefix}Config')(**options)
  head = 'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'
  config._attn_implementation = 'eager'
  model = getattr(transformers, f'{kind}{head}')(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      size = 0.3 if parameter.ndim > 1 else 0.1
      parameter.add_(size * noise)
  return model


def make_tokens() -> np.ndarray:
  return np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


def run(model) -> dict[str, np.ndarray]:
  """Tokens, logits, and the gradient of a loss for one matrix of each kind."""
  import torch

  tokens = make_tokens()
  logits = model(torch.tensor(tokens)).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten()
  )
  loss.backward()
  gradients = {
    f'gradient {name}': parameter.grad.numpy()
    for name, parameter in model.named_parameters()
  }
  return {'tokens': tokens, 'logits': logits.detach().numpy(), **gradients}


def of_smollm2(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Tokens of some source code, logits at a few places, and the mean loss."""
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer

  place = dict(gguf_file=path.name)
  tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
  model = AutoModelForCausalLM.from_pretrained(
    path.parent, dtype=torch.float32, **place
  ).eval()
  text = pathlib.Path(__file__).read_text() * 2
  tokens = np.array(tokenizer(text)['input_ids'][:1024])
  columns = np.arange(0, model.config.vocab_size, 199)
  with torch.no_grad():
    logits = model(torch.tensor(tokens)[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(
      logits[:-1], torch.tensor(tokens[1:])
    )
  return {
    'tokens': tokens.astype(np.uint16),
    'columns': columns.astype(np.uint16),
    'logits': logits.numpy()[:256:8, columns],
    'loss': loss.numpy(),
  }


def main() -> int:
  if len(sys.argv) > 1:
    found = of_smollm2(pathlib.Path(sys.argv[1]))
    np.savez_compressed(FOLDER / 'smollm2.npz', **found)
    return 0
  for name in CASES:
    folder = FOLDER / name
    model = make_model(name)
    model.save_pretrained(folder)
    (folder / 'generation_config.json').unlink(missing_ok=True)
    found = run(model)
    if not name.startswith('llama'):
      found = {k: v for k, v in found.items() if 'gradient' not in k}
    np.savez_compressed(folder / 'expected.npz', **found)
    kept = json.loads((folder / 'config.json').read_text())
    print(name, kept['model_type'], found['logits'].std())
  return 0


if __name__ == '__main__':
  sys.exit(main())
