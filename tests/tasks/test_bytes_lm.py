"""bytes_lm: real text, cut into splits that share no document."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from longctx.tasks import SPLITS, make_task
from longctx.tasks.bytes_lm import BOS, load_text


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """80 files whose letters are their own, two of them with equal content."""
  root = tmp_path_factory.mktemp('text')
  for i in range(80):
    path = root / f'part{i % 3}' / f'{i}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes([64 + i]) * (50 + i))
  (root / 'part0' / 'again.txt').write_bytes(bytes([64]) * 50)
  (root / 'empty.txt').write_bytes(b'')
  (root / '.hidden').write_bytes(b'\0' * 99)
  return root


def documents(text: np.ndarray) -> list[bytes]:
  assert text[0] == BOS
  parts = np.split(text, np.flatnonzero(text == BOS))[1:]
  return [part[1:].astype(np.uint8).tobytes() for part in parts]


def test_every_file_is_in_exactly_one_split(folder):
  text = load_text(str(folder), '', '')
  found = sorted(d for split in SPLITS for d in documents(text[split]))
  assert found == sorted(bytes([64 + i]) * (50 + i) for i in range(80))
  assert len(documents(text['train'])) > len(documents(text['test'])) > 0


def test_windows_are_the_text_and_predict_its_next_byte(folder):
  task = make_task('bytes_lm', path=str(folder), seq_len=60)
  text = {s: t.tolist() for s, t in load_text(str(folder), '', '').items()}
  for split in SPLITS:
    whole = ' '.join(map(str, text[split]))
    for index in range(20):
      example = task.get(0, split, index)
      window = [*example.tokens.tolist(), int(example.labels[-1])]
      assert ' '.join(map(str, window)) in whole
      assert example.labels[:-1].tolist() == window[1:-1]
      assert (example.weights == (example.labels != BOS)).all()


def test_packed_windows_count_their_documents(folder):
  task = make_task('bytes_lm', path=str(folder), seq_len=100, packed=True)
  for index in range(50):
    example = task.get(0, 'train', index)
    begins = example.tokens == BOS
    begins[0] = True
    assert (example.segment_ids == np.cumsum(begins)).all()
    # Every document here has a letter of its own.
    for segment in range(1, example.segment_ids.max() + 1):
      inside = example.tokens[example.segment_ids == segment]
      assert len(set(inside) - {BOS}) <= 1


def test_prepended_bos_takes_the_place_of_the_first_token(folder):
  plain = make_task('bytes_lm', path=str(folder))
  with_bos = make_task('bytes_lm', path=str(folder), prepend_bos=True)
  for index in range(10):
    a, b = (t.get(0, 'train', index) for t in (plain, with_bos))
    assert b.tokens[0] == BOS
    assert (a.tokens[1:] == b.tokens[1:]).all()
    assert (a.labels == b.labels).all()


def test_one_file_is_split_into_regions_that_do_not_overlap(tmp_path):
  path = tmp_path / 'book'
  path.write_bytes(bytes(i * 256 // 1600 for i in range(1600)))
  text = load_text(str(path), '', '')
  assert [len(text[s]) for s in SPLITS] == [1400, 100, 100]
  assert np.concatenate([text[s] for s in SPLITS]).tobytes() == (
    path.read_bytes()
  )
  task = make_task('bytes_lm', path=str(path), seq_len=99)
  tops = [task.get(0, s, 0).tokens.max() for s in SPLITS]
  assert tops == sorted(tops)
  assert task.get(0, 'test', 0).tokens.min() == text['test'][0]


def test_standard_library_is_the_default_text():
  task = make_task('bytes_lm', seq_len=1024)
  text = load_text('', '', '')
  sizes = {split: len(text[split]) for split in SPLITS}
  assert sizes['train'] > 2**20
  assert min(sizes['validation'], sizes['test']) > 2**15
  source = b''.join(documents(text['train']))
  assert b'class OrderedDict' in source + b''.join(documents(text['test']))
  # Spaces: indentation makes them commonest.
  assert task.chance == pytest.approx(source.count(b' ') / len(source))


def test_tfds_text_dataset_is_read_by_name(tmp_path):
  with tfds.core.registered.skip_registration():

    class Verses(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')
      url_infos = {}  # noqa: RUF012

      def _info(self):
        features = {'text': tfds.features.Text(), 'number': np.int64}
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        for i in range(60):
          yield i, {'text': f'verse {i} ' * 9, 'number': i}

  Verses(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  task = make_task(
    'bytes_lm', tfds_name='verses', tfds_data_dir=str(tmp_path), seq_len=30
  )
  text = load_text('', 'verses', str(tmp_path))
  found = sorted(d for split in SPLITS for d in documents(text[split]))
  assert found == sorted(f'verse {i} '.encode() * 9 for i in range(60))
  assert task.get(0, 'test', 0).tokens.max() <= BOS


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      dict(path='/no/such/text'),
      'cannot read text from /no/such/text: No such',
    ),
    (
      dict(tfds_name='no_such_set'),
      "cannot read the TFDS dataset 'no_such_set'",
    ),
    (dict(path='a', tfds_name='b'), 'are both set'),
    (dict(seq_len=2**24), 'fewer than seq_len [+] 1 = 16777217'),
    (dict(seq_len=0), 'at least 1'),
  ],
)
def test_text_that_is_not_there_ends_with_one_line(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    make_task('bytes_lm', **fields)
  assert '\n' not in str(error.value)


def test_text_too_small_to_split_is_an_error(tmp_path):
  (tmp_path / 'one.txt').write_text('a file on its own' * 99)
  with pytest.raises(ValueError, match=r'split of .* has 0 bytes'):
    make_task('bytes_lm', path=str(tmp_path), seq_len=16)
  (tmp_path / 'empty').write_bytes(b'')
  with pytest.raises(ValueError, match='is empty'):
    make_task('bytes_lm', path=str(tmp_path / 'empty'))
