"""Single layers by name, and the bytes that they say decoding keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.attention import VARIANTS, AttentionConfig, make_layer
from longctx.attention.cache_spec import empty_cache

# A pattern of blocks is the one argument without a default.
NEEDED = {'block_sparse': {'pattern': ('1', '11')}}
T = 13


def make(variant, **arguments):
  arguments = {**VARIANTS[variant].small, **arguments}
  return make_layer(variant, d_model=16, rngs=nnx.Rngs(0), **arguments)


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_layer_needs_no_more_than_its_name_and_width(variant):
  layer = make_layer(
    variant, d_model=16, rngs=nnx.Rngs(0), **NEEDED.get(variant, {})
  )
  x = jax.ShapeDtypeStruct((2, T, 16), jnp.float32)
  graph, state = nnx.split(layer)
  run = lambda state, x: nnx.merge(graph, state)(x)
  assert jax.eval_shape(run, state, x).shape == x.shape


def test_arguments_are_those_of_the_config_and_of_the_variant():
  layer = make_layer(
    'sliding_window',
    d_model=64,
    num_heads=8,
    head_dim=4,
    window=5,
    rngs=nnx.Rngs(0),
  )
  assert layer.config == AttentionConfig(
    d_model=64, num_heads=8, num_kv_heads=8, head_dim=4, value_dim=4
  )
  assert np.asarray(layer.mask.dense(9, 9)).sum(1).max() == 5
  with pytest.raises(ValueError, match="full takes no 'windw'; "):
    make_layer('full', d_model=64, windw=5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ('variant', 'argument'), [('full', 'chunk_size'), ('linear', 'block_q')]
)
def test_an_argument_that_sets_nothing_is_refused(variant, argument):
  with pytest.raises(ValueError, match=f"nothing that .'{argument}'. would"):
    make_layer(variant, d_model=16, rngs=nnx.Rngs(0), **{argument: 8})


@pytest.mark.parametrize('variant', VARIANTS)
def test_state_bytes_are_those_of_a_row_of_the_cache(variant):
  layer = make(variant, dtype='bfloat16')
  cache = empty_cache(layer.cache_spec(T), 1)
  row = sum(x.nbytes for x in cache)
  assert layer.state_bytes(T) == row
  assert layer.state_bytes(T, 'float32') >= row
