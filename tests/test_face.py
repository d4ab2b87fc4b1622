"""`import longctx as lc`: all names, at the price of none."""

import ast
import os
import pathlib
import pydoc
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import longctx as lc

PROGRAM = """
import sys
import longctx as lc
loaded = [m for m in sys.modules if m.startswith('longctx')]
print(*loaded, 'jax' in sys.modules, 'numpy' in sys.modules)
import jax
print(len(jax.devices()))
"""


def test_import_loads_nothing_and_leaves_libtpu_silent():
  unset = ('JAX_PLATFORMS', 'XLA_FLAGS', 'TPU_')
  env = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM], capture_output=True, text=True, env=env
  )
  assert done.stderr == ''
  imported, devices = done.stdout.splitlines()
  assert imported == 'longctx False False'
  assert int(devices) >= 1


@pytest.mark.parametrize('name', lc.__all__)
def test_name_resolves_and_help_says_what_it_is_for(name):
  value = getattr(lc, name)
  assert value is not None
  assert name in dir(lc)
  (line,) = (s for s in lc.__doc__.splitlines() if s[4:].startswith(f'{name} '))
  assert len(line.split()) > 2 and len(line) <= 80
  assert getattr(value, '__doc__', None), f'{name} has no docstring'


THREADS = """
import threading
import jax
from flax import nnx
import longctx as lc
failed = []
def use(name):
  try:
    getattr(lc, name)
  except BaseException as error:
    failed.append(f'{name}: {error}')
threads = [threading.Thread(target=use, args=(name,)) for name in lc.__all__]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*failed, sep='\\n', end='')
"""


def test_threads_may_use_names_first():
  done = subprocess.run(
    [sys.executable, '-c', THREADS], capture_output=True, text=True
  )
  assert (done.stdout, done.returncode) == ('', 0), done.stderr


def test_help_begins_with_the_table():
  assert 'exact attention under' in pydoc.render_doc(lc).split('CLASSES')[0]


def test_type_checkers_see_the_table():
  tree = ast.parse(pathlib.Path(lc.__file__).read_text())
  (block,) = (node for node in tree.body if isinstance(node, ast.If))
  seen = {
    alias.asname or alias.name: f'{node.module}.{alias.name}'
    for node in block.body
    for alias in node.names
  }
  assert seen == {name: path for name, (path, _) in lc._FACE.items()}
  assert sorted(lc.__all__) == sorted(lc._FACE)
  assert pathlib.Path(lc.__file__).with_name('py.typed').exists()


def test_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'atention'"):
    _ = lc.atention


def test_readers_first_lines_run():
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
  mask = lc.masks.Causal() & lc.masks.SlidingWindow(3)
  out = lc.dot_product_attention(q, k, v, mask=mask)
  narrow = lc.dot_product_attention(q, k, v, mask=lc.masks.SlidingWindow(3))
  np.testing.assert_allclose(out, narrow, atol=1e-6)
  assert lc.parallel.make_mesh(seq=2).shape['seq'] == 2
  layer = lc.Attention('gla', d_model=16, num_heads=2, rngs=nnx.Rngs(0))
  assert layer(q.reshape(1, 16, 16)).shape == (1, 16, 16)
