"""One table of tolerances, by dtype, and the names of dtypes in test ids.

    np.testing.assert_allclose(out, expected, **tolerance(out.dtype))

A test that needs a looser bound than the table's gives its reason beside it.
"""

import jax.numpy as jnp

# Sums of a few hundred products of order one. float32 leaves room for another
# order of summation, bfloat16 for one rounding (2**-8) of inputs and of the
# output, float64 for nothing but a reordered sum.
TOLERANCE = {
  'float64': dict(atol=1e-10, rtol=1e-10),
  'float32': dict(atol=1e-5, rtol=1e-5),
  'bfloat16': dict(atol=2e-2, rtol=2e-2),
}

# 'B2-T63-N4-K2-H32-bf16' reads better than 'B2-T63-N4-K2-H32-bfloat16'.
DTYPE_ID = {'float64': 'f64', 'float32': 'f32', 'bfloat16': 'bf16'}


def tolerance(dtype):
  """The keyword arguments of `np.testing.assert_allclose` for a dtype."""
  name = jnp.dtype(dtype).name
  if name not in TOLERANCE:
    raise ValueError(f'no tolerance for {name}; known: {sorted(TOLERANCE)}')
  return TOLERANCE[name]


def case_id(dtype='float32', **dims):
  """A test id: case_id(B=2, T=63, dtype='bfloat16') -> 'B2-T63-bf16'."""
  parts = [f'{letter}{size}' for letter, size in dims.items()]
  return '-'.join([*parts, DTYPE_ID[jnp.dtype(dtype).name]])
