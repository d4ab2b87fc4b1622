"""What goes to cuDNN, and what the call that JAX has for it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import masks, parallel
from longctx.ops.dot_product_attention import dot_product_attention
from longctx.ops.target import Target, compiling_for
from tests.ops.attention_cases import make_inputs
from tests.tolerances import tolerance

GPU = Target('gpu', 'NVIDIA H100 80GB HBM3')


@pytest.fixture
def calls(monkeypatch):
  """How JAX's function was called; it computes without cuDNN."""
  calls, attend = [], jax.nn.dot_product_attention

  def note(*arrays, implementation, **options):
    calls.append((implementation, options))
    return attend(*arrays, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', note)
  return calls


@pytest.mark.parametrize(
  'mask',
  [masks.Causal(), masks.SlidingWindow(7), masks.Full()],
  ids=['causal', 'window', 'full'],
)
def test_plain_attention_of_a_gpu_is_that_of_cudnn(calls, mask):
  inputs = make_inputs(V=8, dtype='bfloat16')[:3]

  def gradients(inputs, implementation):
    loss = lambda q, k, v: dot_product_attention(
      q, k, v, mask=mask, scale=0.3, implementation=implementation
    ).astype(jnp.float32)
    out, vjp = jax.vjp(loss, *inputs)
    return out, *vjp(jnp.cos(out))

  with compiling_for(GPU):
    actual = gradients(inputs, None)
  assert [implementation for implementation, _ in calls] == ['cudnn']
  for x, y in zip(actual, gradients(inputs, 'reference'), strict=True):
    size = max(1, abs(np.asarray(y, np.float32)).max())
    np.testing.assert_allclose(
      np.asarray(x, np.float32) / size,
      np.asarray(y, np.float32) / size,
      **tolerance('bfloat16'),
    )


REFUSED = {
  'lse': dict(return_lse=True),
  'sink': dict(sink_logits=jnp.zeros(4)),
  'soft cap': dict(logits_soft_cap=2.0),
  'positions': dict(q_positions=np.arange(37)),
  'documents': dict(q_segment_ids=np.zeros((2, 37), int)),
  'normalizer': dict(normalizer='sigmoid'),
  'mask': dict(mask=masks.Causal() & masks.PrefixColumns(3)),
  'both sides': dict(mask=masks.SlidingWindow(3, 3)),
  'dropout': dict(dropout=(0.1, jax.random.key(0))),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cudnn_lacks_goes_elsewhere_or_is_refused(calls, case):
  q, k, v = make_inputs(V=8, dtype='bfloat16')[:3]
  attend = functools.partial(dot_product_attention, q, k, v, **REFUSED[case])
  with compiling_for(GPU):
    jax.eval_shape(attend)
    assert not calls
    with pytest.raises(NotImplementedError, match='cudnn'):
      attend(implementation='cudnn')


@pytest.mark.parametrize(
  ('scheme', 'count'),
  [('ring', 0), ('all_gather', 0), ('ulysses', 1)],
)
def test_a_mesh_sends_whole_sequences_alone_to_cudnn(calls, scheme, count):
  # What a device has of the others is at positions that cuDNN does not know.
  attend = functools.partial(
    parallel.dot_product_attention,
    mesh=parallel.make_mesh(seq=2),
    scheme=scheme,
    layout='contiguous',
  )
  with compiling_for(GPU):
    jax.eval_shape(attend, *make_inputs(T=36, V=8, dtype='bfloat16')[:3])
  assert len(calls) == count


def test_cudnn_is_refused_by_name_where_it_cannot_run():
  for shape, message in (
    (dict(), 'float32'),
    (dict(dtype='bfloat16', V=12), 'V=12'),
    (dict(dtype='bfloat16', V=8, S=40), 'T = S'),
  ):
    q, k, v = make_inputs(**shape)[:3]
    with (
      compiling_for(GPU),
      pytest.raises(NotImplementedError, match=message),
    ):
      dot_product_attention(q, k, v, implementation='cudnn')
  with (
    compiling_for(Target('gpu', 'Tesla V100-SXM2-16GB')),
    pytest.raises(NotImplementedError, match='V100'),
  ):
    dot_product_attention(q, k, v, implementation='cudnn')
  q, k, v = make_inputs()[:3]
  with pytest.raises(NotImplementedError, match='for cpu'):
    dot_product_attention(q, k, v, implementation='cudnn')
