"""Checkpoints: what is read back is what was written, or it is refused."""

import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from longctx.training.checkpoint import (
  Checkpointer,
  CheckpointError,
  abstract,
  digest,
)


@pytest.fixture(scope='module')
def state():
  normal = jax.random.normal(jax.random.key(0), (64, 40))
  return {
    'params': {
      'embedding': normal,
      'blocks': {0: {'scale': jnp.arange(4.0)}},
      'half': jnp.arange(6, dtype=jnp.bfloat16),
    },
    'opt': ({'count': jnp.array(7, jnp.int32)}, {'mu': normal * 2}),
  }


@pytest.fixture
def said():
  return []


def open_with(directory, said):
  return Checkpointer(directory, keep=3, say=said.append)


@pytest.fixture
def saved(tmp_path, state, said):
  """A folder with checkpoints 1, 2 and 3, whose data position is the step."""
  checkpointer = open_with(tmp_path / 'checkpoints', said)
  for step in (1, 2, 3):
    checkpointer.save(
      step, **state, data={'next_batch': step}, meta={'seconds': step / 3}
    )
  checkpointer.close()
  return tmp_path / 'checkpoints'


def biggest_file(folder: pathlib.Path) -> pathlib.Path:
  # Nothing is read from Orbax's commit_success.txt.
  files = [
    path
    for path in folder.rglob('*')
    if path.is_file() and path.name != 'commit_success.txt'
  ]
  return max(files, key=lambda path: path.stat().st_size)


def flip_bit(folder: pathlib.Path):
  path = biggest_file(folder)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(folder: pathlib.Path):
  path = biggest_file(folder)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_everything(folder: pathlib.Path):
  for path in folder.rglob('*'):
    if path.is_file():
      path.write_bytes(b'')


def test_restored_state_is_bit_identical_in_structure_and_dtype(
  saved, state, said
):
  checkpointer = open_with(saved, said)
  found = checkpointer.restore(**abstract(state))
  checkpointer.close()
  assert (found.step, found.data, found.meta) == (
    3,
    {'next_batch': 3},
    {'seconds': 1.0},
  )
  restored = {'params': found.params, 'opt': found.opt}
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for a, b in zip(
    jax.tree.leaves(restored), jax.tree.leaves(state), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert not said


def test_params_can_be_restored_without_the_optimizer(saved, state, said):
  checkpointer = open_with(saved, said)
  found = checkpointer.restore(params=abstract(state['params']))
  checkpointer.close()
  assert found.opt is None
  np.testing.assert_array_equal(found.params['half'], state['params']['half'])


# Orbax gives up at the first bad array and leaves its other reads to a loop
# that is closed by then, which they sometimes complain about.
ignores_abandoned_reads = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(autouse=True)
def collect_abandoned_reads(request):
  """Lets them complain now, and not in whatever test comes later."""
  yield
  if request.node.get_closest_marker('filterwarnings'):
    gc.collect()


@ignores_abandoned_reads
@pytest.mark.parametrize('damage', [flip_bit, truncate])
@pytest.mark.parametrize('item', ['params', 'opt', 'data', 'meta'])
def test_damaged_newest_checkpoint_gives_way_to_an_older_one(
  saved, state, said, damage, item
):
  damage(saved / '3' / item)
  checkpointer = open_with(saved, said)
  found = checkpointer.restore(**abstract(state))
  assert found.step == 2
  assert found.data == {'next_batch': 2}
  assert said[0].startswith('checkpoint 3 is damaged')
  assert said[1] == 'using checkpoint 2'
  # Its place must be free for the run that makes step 3 again.
  checkpointer.set_aside_after(found.step)
  assert checkpointer.steps() == [1, 2]
  checkpointer.save(3, **state, data={}, meta={})
  checkpointer.close()


@ignores_abandoned_reads
def test_all_damaged_is_an_error_that_lists_the_steps(saved, state, said):
  flip_bit(saved / '1' / 'params')
  truncate(saved / '2' / 'opt')
  empty_everything(saved / '3')
  checkpointer = open_with(saved, said)
  with pytest.raises(CheckpointError, match=r'every checkpoint .* \[1, 2, 3\]'):
    checkpointer.restore(**abstract(state))
  checkpointer.close()
  assert all('\n' not in line for line in said)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'half': jnp.zeros(6, jnp.float32)},
      r'params half is bfloat16\[6\] there and float32\[6\] in this config',
    ),
    ({'half': jnp.zeros(7, jnp.bfloat16)}, r'bfloat16\[6\] .* bfloat16\[7\]'),
    ({'more': jnp.zeros(2)}, r'more is nothing there and float32\[2\]'),
    ({'half': None}, r'half is bfloat16\[6\] there and nothing in this config'),
  ],
)
def test_checkpoint_of_another_model_is_refused_by_leaf(
  saved, state, said, change, message
):
  checkpointer = open_with(saved, said)
  other = abstract({**state['params'], **change})
  with pytest.raises(CheckpointError, match=message) as error:
    checkpointer.restore(params=other)
  with pytest.raises(CheckpointError, match=message):
    checkpointer.check(params=other)
  checkpointer.close()
  assert '\n' not in str(error.value)


def test_step_that_orbax_does_not_take_is_an_error(saved, state, said):
  checkpointer = open_with(saved, said)
  with pytest.raises(CheckpointError, match='checkpoint 2 was not written'):
    checkpointer.save(2, **state, data={}, meta={})
  checkpointer.close()


def test_state_with_a_nan_is_not_written(saved, state, said):
  checkpointer = open_with(saved, said)
  bad = {**state['params'], 'half': state['params']['half'].at[2].set(np.nan)}
  with pytest.raises(FloatingPointError, match='params half is not finite'):
    checkpointer.save(4, params=bad, opt=state['opt'], data={}, meta={})
  assert checkpointer.steps() == [1, 2, 3]
  checkpointer.close()


def test_empty_folder_restores_nothing(tmp_path, state, said):
  checkpointer = open_with(tmp_path / 'checkpoints', said)
  assert checkpointer.restore(**abstract(state)) is None
  checkpointer.close()


def test_unfinished_write_is_ignored_and_removed(saved, state, said):
  leftover = saved / '4.orbax-checkpoint-tmp'
  leftover.mkdir()
  checkpointer = open_with(saved, said)
  assert checkpointer.restore(**abstract(state)).step == 3
  checkpointer.remove_unfinished()
  checkpointer.close()
  assert not leftover.exists()


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool']
)
def test_digest_sees_any_changed_element_and_any_swap(dtype):
  x = jnp.arange(12).astype(dtype).reshape(3, 4)
  swapped = x.at[0, 0].set(x[2, 3]).at[2, 3].set(x[0, 0])
  changed = x.at[1, 2].set(x[1, 2] + 1 if dtype != 'bool' else ~x[1, 2])
  found = {str(digest({'x': y})[0]) for y in (x, swapped, changed, x.T)}
  assert len(found) == 4


def test_digest_does_not_depend_on_the_sharding():
  x = jax.random.normal(jax.random.key(1), (16, 8))
  expected = digest({'x': x})
  for shape in ((8, 1), (2, 4), (1, 8)):
    mesh = jax.make_mesh(shape, ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('a', 'b')))
    assert digest({'x': sharded}) == expected


def test_checkpoint_of_eight_devices_restores_on_other_meshes(tmp_path, said):
  def placed(devices):
    mesh = jax.make_mesh((devices,), ('a',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('a'))
    return {'x': jax.device_put(jnp.arange(32.0).reshape(16, 2), sharding)}

  checkpointer = open_with(tmp_path / 'checkpoints', said)
  state = placed(8)
  checkpointer.save(1, params=state, opt=state, data={}, meta={})
  checkpointer.wait()
  for devices in (8, 4, 1):
    target = placed(devices)
    found = checkpointer.restore(params=abstract(target))
    np.testing.assert_array_equal(found.params['x'], target['x'])
    assert found.params['x'].sharding == target['x'].sharding
  checkpointer.close()
