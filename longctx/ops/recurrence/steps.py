"""Steps of a linear recurrence: what each reads, writes and forgets.

This is where one recurrence differs from another. What passes a sequence on
(the scan over chunks, the calls of kernels, the mesh) takes `Steps` whole. A
transition of another form, say a diagonal plus a low rank of keys of its own
(RWKV-7), is one more field, and a case in the four functions that compute with
it: `reference.recurrence`, `chunked.chunk`, `pallas_tpu_kernels.chunk` and
`final_state`. Several writes per token (DeltaProduct) are several steps, of
which the last alone has a query and the first alone a decay.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.typing import Array, Float, Int

# exp(-100) is zero in float32; a stronger decay would only cost precision in
# the sums of its neighbours.
SMALLEST_LOG_DECAY = -100.0


State = Float[Array, 'B N P V']
# How often the segment id has changed so far, or None without segments.
SegmentIndex = Int[Array, 'B T'] | None
# (out, last state)
Results = tuple[Float[Array, 'B T N V'], State]


class Steps(NamedTuple):
  """Inputs of a recurrence with a matrix state S [P, V] per query head.

    S_t = A_t S_{t-1} + k_t w_tᵀ        out_t = q_t S_t

  Without beta A_t = exp(log_decay_t) and w_t = v_t (linear attention); with it
  A_t = (I - beta_t k_t k_tᵀ) exp(log_decay_t) and w_t = beta_t v_t (the gated
  delta rule). Steps of zeros change no state.
  """

  q: Float[Array, 'B T N P']
  k: Float[Array, 'B T K P']
  v: Float[Array, 'B T K V']
  beta: Float[Array, 'B T N'] | None = None
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None

  def map(self, f: Callable[[str, Any], Any]) -> 'Steps':
    """f(name, array) of every array that there is."""
    arrays = self._asdict().items()
    return self._replace(
      **{name: f(name, x) for name, x in arrays if x is not None}
    )

  def per_query_head(self, dtype: jax.typing.DTypeLike) -> 'Steps':
    """With a key and a value for every query head, all of one dtype."""
    group = self.q.shape[2] // self.k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (self.k, self.v))
    return self._replace(k=k, v=v).map(lambda _, x: x.astype(dtype))


def index_segments(segment_ids: Int[Array, 'B T'] | None) -> SegmentIndex:
  """How often the id has changed so far: an id may come back, a count not."""
  if segment_ids is None:
    return None
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)])
