"""What each trained memory answers, predicted without training it.

    python -m studies.retrieval.law

Keys and codewords are random; a map for which the length of keys matters is
given the length, of LENGTHS, that serves it best. DeltaNet's rule is that of
one write pass, its β the best of BETAS; decay, gates and filler are left out.
"""

from longctx.analysis import capacity
from longctx.ops.recurrence.feature_maps import (
  make_feature_map,
)
from studies.retrieval.config import CAPACITY, PAIRS

LENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
BETAS = (0.5, 1.0)
HOMOGENEOUS = ('identity', 'relu', 'dpfp')


def memories(run: str) -> list[capacity.Memory]:
  """Those of which the best is the prediction; none for a window."""
  kind = run.split()[0]
  if kind == 'softmax':
    return [capacity.softmax_memory(scale=16.0)]
  if kind == 'delta':
    return [capacity.delta_memory(beta=beta) for beta in BETAS]
  if kind == 'window':
    return []
  phi = make_feature_map(kind)
  lengths = (1.0,) if kind in HOMOGENEOUS else LENGTHS
  return [capacity.linear_memory(phi, length=length) for length in lengths]


def predicted(run: str, *, pairs=PAIRS, seed: int = 0) -> list[float]:
  """Accuracy at each number of pairs; an empty list where there is no rule."""
  _, key_dim, value_dim = CAPACITY[run]
  found = memories(run)
  return [
    capacity.best_accuracy(
      found, num_pairs=n, key_dim=key_dim, value_dim=value_dim, seed=seed
    )
    for n in pairs
    if found
  ]


if __name__ == '__main__':
  for name in CAPACITY:
    print(f'{name:20}', *(f'{x:6.3f}' for x in predicted(name)))
