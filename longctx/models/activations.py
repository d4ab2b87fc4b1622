"""Activations of MLPs: GELU, SiLU, and gated ones (GLU variants)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from longctx.typing import Array

_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


class Activation(NamedTuple):
  """Activation of an MLP.

  Attributes:
    function: elementwise.
    is_gated: whether W_out reads function(W_gate x) · W_in x
      (arXiv:2002.05202) in place of function(W_in x).
  """

  function: Callable[[Array], Array]
  is_gated: bool = False


ACTIVATIONS = {
  'gelu': Activation(jax.nn.gelu),
  'gelu_exact': Activation(_exact_gelu),
  'relu': Activation(jax.nn.relu),
  'silu': Activation(jax.nn.silu),
  'geglu': Activation(jax.nn.gelu, True),
  'geglu_exact': Activation(_exact_gelu, True),
  'reglu': Activation(jax.nn.relu, True),
  'swiglu': Activation(jax.nn.silu, True),
}
