"""ALiBi's slopes, as published."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.alibi import alibi_slopes
from tests.tolerances import tolerance


@pytest.mark.parametrize(
  ('num_heads', 'exponents'),
  [
    (1, [8]),
    (2, [4, 8]),
    (3, [4, 8, 2]),
    (6, [2, 4, 6, 8, 1, 3]),
    (8, [1, 2, 3, 4, 5, 6, 7, 8]),
    (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
  ],
)
def test_slopes_equal_the_published_ones(num_heads, exponents):
  slopes = alibi_slopes(num_heads)
  assert slopes.dtype == jnp.float32
  np.testing.assert_allclose(
    slopes, 2.0 ** -np.array(exponents), **tolerance('float32')
  )


def test_no_heads_is_an_error():
  with pytest.raises(ValueError, match='num_heads=0 must be at least 1'):
    alibi_slopes(0)
