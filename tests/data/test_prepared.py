"""A prepared task is the task, example for example, or an error."""

import multiprocessing
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from longctx.data.errors import DamagedDataError
from longctx.data.pipeline import make_iterator
from longctx.data.prepared import (
  _aside,
  dataset_folder,
  open_prepared,
  prepare,
)
from longctx.tasks import make_task
from longctx.tasks.bytes_lm import load_text

TASK = make_task('mqar', num_pairs=2, seq_len=16, vocab_size=32)
SIZES = {'train': 40, 'validation': 12}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  root = tmp_path_factory.mktemp('prepared')
  prepare(TASK, seed=1, sizes=SIZES, directory=str(root))
  return str(root)


def same(left, right):
  return left.keys() == right.keys() and all(
    left[k].dtype == right[k].dtype and np.array_equal(left[k], right[k])
    for k in left
  )


def test_prepared_examples_are_those_made_on_the_fly(directory):
  for split, size in SIZES.items():
    source = open_prepared(directory, TASK, split=split, seed=1)
    assert len(source) == size
    for index in np.random.default_rng(0).permutation(size):
      index = int(index)
      assert same(source[index], TASK.get(1, split, index).arrays())


def test_segment_ids_are_prepared_too(tmp_path):
  for i in range(50):
    (tmp_path / f'{i}.txt').write_bytes(bytes([i]) * 99)
  task = make_task('bytes_lm', path=str(tmp_path), seq_len=64, packed=True)
  directory = str(tmp_path / '.prepared')
  prepare(task, seed=0, sizes={'test': 5}, directory=directory)
  source = open_prepared(directory, task, split='test', seed=0)
  for index in range(5):
    example = source[index]
    assert 'segment_ids' in example
    assert same(example, task.get(0, 'test', index).arrays())


def test_relevant_tokens_are_prepared_too(tmp_path):
  task = make_task('variable_tracking')
  prepare(task, seed=0, sizes={'test': 5}, directory=str(tmp_path))
  source = open_prepared(str(tmp_path), task, split='test', seed=0)
  for index in range(5):
    example = source[index]
    assert example['relevant'].any()
    assert same(example, task.get(0, 'test', index).arrays())


def test_any_tfds_reader_can_read_it(directory):
  name = '/'.join(dataset_folder(directory, TASK, 1).parts[-3:-1])
  source = tfds.data_source(name, data_dir=directory, split='train[10:12]')
  tokens = [record['tokens'] for record in source]
  wanted = [TASK.get(1, 'train', i).tokens for i in (10, 11)]
  np.testing.assert_array_equal(tokens, wanted)


def test_preparing_again_changes_nothing(directory):
  before = dataset_folder(directory, TASK, 1).stat().st_mtime_ns
  prepare(TASK, seed=1, sizes={'train': 7}, directory=directory)
  assert dataset_folder(directory, TASK, 1).stat().st_mtime_ns == before
  with pytest.raises(ValueError, match=r'holds 40 train .* fewer than 41'):
    prepare(TASK, seed=1, sizes={'train': 41}, directory=directory)


def _prepare(directory):
  prepare(TASK, seed=0, sizes={'train': 300}, directory=directory)


def test_two_processes_may_prepare_at_once(tmp_path):
  context = multiprocessing.get_context('spawn')
  processes = [
    context.Process(target=_prepare, args=(str(tmp_path),)) for _ in range(2)
  ]
  for process in processes:
    process.start()
  for process in processes:
    process.join()
  assert [process.exitcode for process in processes] == [0, 0]
  source = open_prepared(str(tmp_path), TASK, split='train', seed=0)
  assert same(source[299], TASK.get(0, 'train', 299).arrays())
  assert [p.name for p in tmp_path.iterdir()] == ['longctx_task']
  left = [p.name for p in (tmp_path / 'longctx_task').iterdir()]
  assert left == [dataset_folder(str(tmp_path), TASK, 0).parent.name]


@pytest.mark.parametrize(
  ('task', 'split', 'seed', 'message'),
  [
    (TASK, 'train', 0, r'differs in seed \(1 there, 0 here\)'),
    (TASK, 'test', 1, 'no test examples: prepare them, with --num_test=N'),
    (
      make_task('mqar', num_pairs=3, seq_len=16, vocab_size=32),
      'train',
      1,
      r'differs in num_pairs \(2 there, 3 here\)',
    ),
    (make_task('copying'), 'train', 1, r'the task \(mqar there, copying here'),
  ],
  ids=['seed', 'split', 'field', 'task'],
)
def test_other_data_is_refused(directory, task, split, seed, message):
  with pytest.raises(ValueError, match=message) as error:
    open_prepared(directory, task, split=split, seed=seed)
  assert '\n' not in str(error.value)


def test_missing_directory_says_how_to_prepare(tmp_path):
  with pytest.raises(ValueError, match=r'prepare --task=mqar --data_dir='):
    open_prepared(str(tmp_path / 'none'), TASK, split='train', seed=0)


def test_reading_past_the_end_is_an_error(directory):
  iterator = make_iterator(
    TASK, split='train', batch_size=16, seed=1, directory=directory
  )
  assert [len(next(iterator)['tokens']) for _ in range(2)] == [16, 16]
  with pytest.raises(ValueError, match='past the end of the 40 prepared'):
    next(iterator)
  iterator.close()
  with pytest.raises(ValueError, match='num_examples=41 is more than the 40'):
    make_iterator(
      TASK,
      split='train',
      batch_size=16,
      seed=1,
      directory=directory,
      num_examples=41,
    )


def test_changed_text_is_refused(tmp_path):
  path = tmp_path / 'text'
  path.write_bytes(b'one text ' * 99)
  task = make_task('bytes_lm', path=str(path), seq_len=16)
  prepare(task, seed=0, sizes={'train': 2}, directory=str(tmp_path))
  other = tmp_path / 'other'
  other.write_bytes(b'not this ' * 99)
  load_text.cache_clear()
  other.replace(path)
  with pytest.raises(ValueError, match='its text or its code has changed'):
    open_prepared(str(tmp_path), task, split='train', seed=0)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  ('pattern', 'damage'),
  [
    ('*.array_record*', flip),
    ('*.array_record*', cut),
    ('*.array_record*', lambda path: path.unlink()),
    ('metadata.json', cut),
    ('dataset_info.json', cut),
    ('features.json', cut),
    ('dataset_info.json', lambda path: path.unlink()),
    ('metadata.json', lambda path: path.unlink()),
  ],
)
def test_damage_ends_with_one_line(pattern, damage, tmp_path):
  folder = prepare(TASK, seed=0, sizes={'train': 20}, directory=str(tmp_path))
  (path,) = folder.glob(pattern)
  damage(path)
  with pytest.raises(ValueError, match='prepare it again') as error:
    source = open_prepared(str(tmp_path), TASK, split='train', seed=0)
    for index in range(20):
      source[index]
  assert '\n' not in str(error.value)
  # And so it does where it is to be prepared again.
  with pytest.raises(DamagedDataError, match='prepare it again') as again:
    prepare(TASK, seed=0, sizes={'train': 20}, directory=str(tmp_path))
  assert '\n' not in str(again.value)


def test_damage_met_by_a_run_names_the_file(tmp_path):
  task = make_task('mqar', num_pairs=4, seq_len=64, vocab_size=64)
  folder = prepare(task, seed=0, sizes={'train': 400}, directory=str(tmp_path))
  (path,) = folder.glob('*.array_record*')
  content = bytearray(path.read_bytes())
  # Neither the first example nor the index at the end.
  for place in range(len(content) // 2, len(content) // 2 + 200):
    content[place] ^= 0xFF
  path.write_bytes(content)
  for workers in (0, 1):
    iterator = make_iterator(
      task,
      split='train',
      batch_size=8,
      seed=0,
      directory=str(tmp_path),
      workers=workers,
    )
    with pytest.raises(DamagedDataError) as error:
      for _ in range(50):
        next(iterator)
    iterator.close()
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_what_a_dead_process_left_is_removed_and_no_more(tmp_path):
  (tmp_path / 'longctx_task' / '.incomplete-dead').mkdir(parents=True)
  (tmp_path / 'longctx_task' / '.incomplete-dead' / 'half').write_bytes(b'1')
  with _aside(tmp_path / 'longctx_task') as alive:
    prepare(TASK, seed=0, sizes={'train': 2}, directory=str(tmp_path))
    left = [p.name for p in (tmp_path / 'longctx_task').glob('.*')]
    assert left == [pathlib.Path(alive).name]
  assert not list((tmp_path / 'longctx_task').glob('.*'))


def test_a_number_of_examples_is_not_negative(tmp_path):
  with pytest.raises(ValueError, match='num_train=-4 must not be negative'):
    prepare(
      TASK, seed=0, sizes={'train': -4, 'test': 3}, directory=str(tmp_path)
    )
