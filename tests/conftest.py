"""Eight virtual CPU devices, no display, deterministic property tests."""

import gc
import importlib.metadata
import os
import pathlib
import signal

# Before jax and matplotlib are imported: a test never asks for an accelerator
# or a display, whatever the machine has.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['MPLBACKEND'] = 'Agg'

# Compiling is most of the suite's time, and its programs are small: code that
# is not optimized costs a ninth to make. What XLA derives from a program (its
# collectives, FLOPs and bytes) stays the same.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_cpu_parallel_codegen_split_count=1',
    # Later versions do not know it, and an unknown flag ends the process.
    *['--xla_cpu_use_fusion_emitters=false']
    * importlib.metadata.version('jaxlib').startswith('0.10.'),
  ]
)

# What was compiled is kept for the next run of the suite. Through the
# environment, so that the programs which tests start share it; `make clean`
# removes it.
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(
  pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'jax'
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

# What commands keep for the next time is kept apart from the user's own, of
# which tests read what was fetched.
os.environ.setdefault(
  'LONGCTX_USER_CACHE', os.environ.get('LONGCTX_CACHE', '~/.cache/longctx')
)
os.environ['LONGCTX_CACHE'] = str(
  pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'longctx'
)

# In the background it is ignored, here and in the commands that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jax
import pytest

from tests import slow

# Takes effect only before the first use of the backend.
jax.config.update('jax_num_cpu_devices', 8)

# Tracing makes many objects that last, among which the collector finds hardly
# any garbage and spends a fifth of the time.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 10, 10)

# A first call compiles, so time per example says nothing; derandomised, so
# that a failure in CI is the failure at home.
hypothesis.settings.register_profile(
  'longctx',
  deadline=None,
  derandomize=True,
  database=None,
  max_examples=50,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('longctx')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Marks the slow tail, before `-m` deselects it; long files come first."""
  items.sort(key=lambda item: slow.order_of(item.nodeid))
  for item in items:
    if slow.pattern_of(item.nodeid):
      item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Frees what a module compiled: a worker would keep 10 GB to the end."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def x64():
  """float64 for one test: the oracle's precision, off everywhere else."""
  with jax.enable_x64(True):
    yield
