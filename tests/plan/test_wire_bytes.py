"""What the formula says is sent is what the TPU compiler's programs send."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import parallel
from longctx.costs.attention import wire_bytes
from longctx.costs.hlo import collective_bytes
from longctx.masks import Causal, PrefixColumns, SlidingWindow
from longctx.ops.target import Target, compiling_for
from longctx.parallel.layout import SequenceLayout
from longctx.plan import topologies
from tests import needs

pytestmark = needs.tpu_compiler

N, K, H, T = 8, 2, 128, 1024

BOTH = dict(seq=4, model=2), ('seq', 'model')
SCHEMES = {
  'ring': (dict(seq=8), 'seq'),
  'ulysses': (dict(seq=8), 'seq'),
  'all_gather': (dict(seq=8), 'seq'),
  'ring+ulysses': BOTH,
}


def compiled_and_predicted(
  scheme, dtype, *, B=2, mask=Causal(), backward=True, implementation=None
):
  """Bytes by kind, of attention on v5e:2x4: of the programs, of the formula."""
  axes, axis = SCHEMES[scheme]
  devices = topologies.describe('v5e:2x4')
  mesh = parallel.topology_mesh(devices, **axes)
  layout = SequenceLayout('zigzag', T, 8)
  sharding = NamedSharding(mesh, P(None, axis))
  q, k, v = (
    jax.ShapeDtypeStruct((B, T, heads, H), dtype, sharding=sharding)
    for heads in (N, K, K)
  )

  def attend(q, k, v):
    return parallel.dot_product_attention(
      q,
      k,
      v,
      mesh=mesh,
      axis=axis,
      scheme=scheme,
      layout=layout,
      in_layout=True,
      mask=mask,
      implementation=implementation,
    )

  def forward(q, k, v):
    return jax.vjp(attend, q, k, v)

  counted = Counter()
  with compiling_for(Target('tpu', devices[0].device_kind)):
    programs = [jax.jit(attend).lower(q, k, v)]
    if backward:
      _, vjp = jax.eval_shape(forward, q, k, v)
      programs = [
        jax.jit(forward).lower(q, k, v),
        jax.jit(lambda vjp, bar: vjp(bar)).lower(vjp, q),
      ]
  for program in programs:
    counted.update(collective_bytes(program.compile().as_text()))
  predicted = wire_bytes(
    scheme,
    B,
    N,
    K,
    H,
    mesh=mesh,
    layout=layout,
    axis=axis,
    mask=mask,
    itemsize=jnp.dtype(dtype).itemsize,
    backward=backward,
  )
  return {kind: sent for kind, sent in counted.items() if sent}, predicted


@pytest.mark.parametrize('B', [1, 2])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_bytes_of_a_tpu_program_are_those_of_the_formula(scheme, B):
  compiled, predicted = compiled_and_predicted(scheme, jnp.bfloat16, B=B)
  assert compiled == predicted


def test_bytes_of_a_window_with_sinks_are_those_of_the_formula():
  # Of one hop. The loop of two hops runs once and is unrolled; then it sends
  # zeros for dk and for dv, which are one array to the compiler.
  mask = SlidingWindow(50) | Causal() & PrefixColumns(8)
  compiled, predicted = compiled_and_predicted('ring', jnp.bfloat16, mask=mask)
  assert predicted['all-reduce'] and compiled == predicted


@pytest.mark.parametrize('scheme', SCHEMES)
def test_float32_is_sent_where_products_are_of_float32(scheme):
  with jax.default_matmul_precision('highest'):
    compiled, predicted = compiled_and_predicted(
      scheme, jnp.float32, backward=False
    )
  assert compiled == predicted


def test_float32_is_rounded_before_it_is_sent_where_products_round_it():
  # A TPU multiplies in bfloat16 unless told otherwise, and its compiler moves
  # the rounding of keys and values from the products to the sender. It sees no
  # product inside of a kernel.
  compiled, predicted = compiled_and_predicted(
    'ring', jnp.float32, backward=False
  )
  assert compiled == predicted
  compiled, predicted = compiled_and_predicted(
    'ring', jnp.float32, backward=False, implementation='xla'
  )
  assert compiled == {kind: sent // 2 for kind, sent in predicted.items()}
