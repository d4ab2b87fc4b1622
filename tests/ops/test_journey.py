"""The journey of q stays short: frames from a call to the kernel."""

import sys
import traceback

import jax
import jax.numpy as jnp
import pytest

import longctx
from longctx import parallel
from longctx.ops.dot_product_attention import dot_product_attention, pallas_tpu

PACKAGE = longctx.__path__[0]


def on_one_device(q):
  return dot_product_attention(q, q, q, implementation='pallas')


def on_a_ring(q):
  # In natural order, which takes a frame more than in the layout's.
  mesh = parallel.make_mesh(seq=4)
  return parallel.dot_product_attention(
    q, q, q, mesh=mesh, implementation='pallas'
  )


@pytest.mark.parametrize(
  ('attend', 'frames', 'files'), [(on_one_device, 5, 3), (on_a_ring, 9, 4)]
)
def test_a_query_reaches_the_kernel_in_few_frames(
  monkeypatch, attend, frames, files
):
  journeys, call_kernel = [], pallas_tpu.call_kernel

  def note(*args, **options):
    stack = traceback.walk_stack(sys._getframe(1))
    names = [frame.f_code.co_filename for frame, _ in stack]
    journeys.append([name for name in names if name.startswith(PACKAGE)])
    return call_kernel(*args, **options)

  monkeypatch.setattr(pallas_tpu, 'call_kernel', note)
  loss = lambda q: attend(q).sum()
  jax.eval_shape(jax.grad(loss), jnp.zeros((1, 512, 2, 8)))
  # Forward, own keys first; the call itself is a frame more.
  assert len(journeys[0]) == frames
  assert len(set(journeys[0])) == files
