"""The TPU kernels, interpreted, inside of every scheme."""

import pytest

from tests.parallel.test_schemes import check_case


@pytest.mark.parametrize(
  ('scheme', 'layout', 'case', 'axes'),
  [
    ('ring', 'zigzag', 'everything', dict(seq=4)),
    ('ring', 'contiguous', 'longformer', dict(seq=4)),
    ('ring', 'striped', 'sigmoid', dict(seq=2)),
    ('ulysses', 'zigzag', 'packed', dict(seq=2)),
    ('all_gather', 'zigzag', 'causal', dict(seq=2)),
    ('ring+ulysses', 'zigzag', 'sinks', dict(seq=2, model=2)),
  ],
)
def test_kernels_on_a_mesh_are_exact(scheme, layout, case, axes):
  check_case(scheme, case, axes=axes, layout=layout, implementation='pallas')
