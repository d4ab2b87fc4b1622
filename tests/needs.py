"""What some tests cannot do without."""

import pytest

from longctx.plan import topologies

tpu_compiler = pytest.mark.skipif(
  not topologies.has_tpu_compiler(),
  reason='libtpu, the TPU compiler, is for Linux on x86-64 alone',
)
