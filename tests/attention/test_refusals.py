"""Wrong arguments of layers, masks and ops, each refused in one line."""

import subprocess
import sys

import pytest
from flax import nnx

from longctx.attention import AttentionConfig, make_attention
from tests.house import ROOT

CONFIG = AttentionConfig(d_model=16, num_heads=2)


@pytest.mark.parametrize(
  ('layer', 'message'),
  [
    ('gla(gate_rank=0)', 'gate_rank=0 must be at least 1'),
    ('mamba2(chunk_size=2.0)', 'chunk_size=2.0 must be an integer, at least 1'),
    ("sliding_window(window='a')", "window='a' must be an integer"),
    (
      'sliding_window(window=8.5)',
      'window=8.5 must be an .*, such as 8',
    ),
    ('moba(top_k=2.5)', 'top_k=2.5 must be an integer'),
    ('full(rope_base=-1.0)', r'rope_base=-1.0 must be in \[1, '),
    ('full(rope_base=0)', r'rope_base=0 must be in \[1, '),
    ("full(dtype='float16')", "dtype='float16', which overflows .*'bfloat16'"),
    ("full(param_dtype='float64')", 'needs jax_enable_x64, without which'),
    ('full(num_kv_heads=0)', 'num_kv_heads=0 must be at least 1'),
    ('full(num_heads=3, num_kv_heads=2)', 'must be a multiple of .*: 2 or 4'),
    ('full(d_model=32)', "takes no 'd_model'"),
    ('full(windw=3)', "takes no 'windw'"),
    ('sliding_window(windw=3)', "'windw'; did you mean window"),
    ('block_sparse', 'block_sparse needs pattern'),
    ("block_sparse(pattern=('', ''))", "must be rows of '0' and '1'"),
    (
      "linear(feature_map='elu1')",
      r"unknown feature_map='elu1'; did you mean elu\+1",
    ),
    (
      "linear(feature_arguments={'a': 1})",
      "feature map 'elu.1' has no 'a'",
    ),
    ("full(position_encoding='learned')", "is the model's, which adds them"),
    ('fulll', "unknown variant 'fulll'; did you mean full"),
    ('dilated(window=65536, dilation=65536)', 'must be at most 2147483647'),
  ],
)
def test_layer_is_refused_in_one_line(layer, message):
  with pytest.raises(ValueError, match=message) as error:
    make_attention(layer, CONFIG, rngs=nnx.Rngs(0))
  assert '\n' not in str(error.value)


def test_layer_with_other_heads_has_as_many_keys_unless_the_model_says():
  def heads(layer, **changes):
    config = AttentionConfig(d_model=16, num_heads=2, **changes)
    made = nnx.eval_shape(
      lambda: make_attention(layer, config, rngs=nnx.Rngs(0))
    )
    return made.config.num_heads, made.config.num_kv_heads

  assert heads('full(num_heads=8)') == (8, 8)
  assert heads('full(num_heads=8)', num_kv_heads=2) == (8, 2)
  assert heads('full(num_heads=8, num_kv_heads=4)') == (8, 4)
  assert heads('full(num_kv_heads=None)', num_kv_heads=1) == (2, 2)


def test_layer_whose_width_is_none_takes_that_of_its_heads():
  made = make_attention('full(head_dim=None)', CONFIG, rngs=nnx.Rngs(0))
  assert made.config.head_dim == 8


# Out of pytest's reach, where jaxtyping would be the first to speak.
PROGRAM = """
import dataclasses
import jax.numpy as jnp
import numpy as np
from flax import nnx
import longctx as lc

@dataclasses.dataclass(frozen=True)
class Own(lc.masks.Primitive):
  table: object
  def allowed(self, q, k):
    return q >= k

@dataclasses.dataclass(frozen=True)
class Bounds(Own):
  def bounds(self, q, k):
    return q.high - k.low + 1, 0 * (q.low - k.high)

ones = lambda *shape: jnp.ones(shape, jnp.int32)
q, f = ones(1, 8, 2, 4), jnp.ones((1, 8, 2, 4))
layer = lc.Attention('full', d_model=16, num_heads=2, rngs=nnx.Rngs(0))
for case in (
  lambda: lc.dot_product_attention(q, f, f),
  lambda: lc.dot_product_attention(f, f, q),
  lambda: lc.linear_attention(q, q, q),
  lambda: lc.gated_delta_rule(q, f, f, ones(1, 8, 2)),
  lambda: layer(jnp.ones((8, 16))),
  lambda: layer(jnp.ones((1, 8, 4))),
  lambda: lc.dot_product_attention(f, f, f, mask=Own(np.arange(3))),
  lambda: lc.dot_product_attention(f, f, f, mask=Bounds(1)),
  lambda: lc.masks.SlidingWindow(2.5),
  lambda: lc.masks.SlidingWindow(-1),
):
  try:
    case()
  except (ValueError, TypeError) as error:
    print(type(error).__name__, error)
  else:
    print('accepted')
"""

EXPECTED = (
  'ValueError q.dtype=int32 must be of real numbers',
  'ValueError v.dtype=int32 must be of real numbers',
  'ValueError q.dtype=int32 must be of real numbers',
  'ValueError q.dtype=int32 must be of real numbers',
  'ValueError x.shape=(8, 16) must be [B, T, 16]',
  'ValueError x.shape=(1, 8, 4) must be [B, T, 16]',
  'TypeError Own has a field that cannot be hashed',
  'TypeError Bounds(table=1): bounds must return (some, all), both Booleans',
  'ValueError SlidingWindow: left=2.5 must be an integer, at least 0',
  'ValueError SlidingWindow: left=-1 must be at least 0',
)


def test_arrays_and_masks_are_refused_in_one_line():
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM], capture_output=True, text=True, cwd=ROOT
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(EXPECTED), done.stdout + done.stderr
  for line, expected in zip(lines, EXPECTED, strict=True):
    assert line.startswith(expected)
