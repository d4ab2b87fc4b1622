"""Log files: what was damaged is told, and nothing else is lost."""

import json
import subprocess

import pytest

from longctx.training import log_files
from longctx.training.errors import DamagedFileError, WriteError
from longctx.training.log_files import JsonLog, read_json, write_json
from longctx.training.metrics_log import MetricsLog, read_metrics

ROWS = [{'step': n, 'split': 'train', 'loss': n / 3} for n in range(1, 9)]


@pytest.fixture
def path(tmp_path):
  """A log of eight lines."""
  JsonLog(tmp_path / 'metrics.jsonl').append(*ROWS)
  return tmp_path / 'metrics.jsonl'


def damage(path, index, text):
  """Exchanges a line, and returns what then lies in the file."""
  lines = path.read_bytes().splitlines()
  lines[index] = text
  path.write_bytes(b''.join(line + b'\n' for line in lines))
  return path.read_bytes()


def open_log(path, *, step=8, saved=None):
  return MetricsLog(
    path.parent, start_step=step, tensorboard=False, saved=saved
  )


GARBAGE = [
  b'',
  b'x!{',
  b'[1, 2]',
  b'\xff\x00',
  b'{"step": 3, "split": "train", "loss": 9}',
  log_files.seal(ROWS[2]).replace(b'"loss": 1.0', b'"loss": 7.0'),
  log_files.seal(ROWS[2]).replace(b'"crc"', b'"crd"'),
]


@pytest.mark.parametrize('text', GARBAGE)
def test_a_damaged_line_is_reported_and_costs_no_other(path, capsys, text):
  saved = open_log(path).state()
  content = damage(path, 2, text)
  rest = [row for row in ROWS if row['step'] != 3]
  log = open_log(path, saved=saved)
  assert log.rows() == rest == read_metrics(path.parent)
  assert path.read_bytes() == content
  assert f'{path}: line 3 is damaged' in capsys.readouterr().err
  log.write(ROWS[0])
  assert path.read_bytes().startswith(content)


@pytest.mark.parametrize('cut', [1, 5, 30])
def test_a_last_line_cut_short_is_dropped_before_the_next(path, cut):
  path.write_bytes(path.read_bytes()[:-cut])
  log = JsonLog(path)
  # Without its end a line is whole.
  kept = ROWS if cut == 1 else ROWS[:-1]
  assert log.rows() == kept
  log.append(ROWS[-1])
  assert log.rows() == [*kept, ROWS[-1]]


def test_lines_of_later_steps_alone_are_made_again(path, capsys):
  open_log(path, step=5)
  assert read_metrics(path.parent) == ROWS[:5]
  assert '3 lines of steps after 5 are made again' in capsys.readouterr().err


def test_lines_that_are_missing_are_told_by_the_checkpoint(path, capsys):
  saved = open_log(path).state()
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b''.join(lines[:3] + lines[4:]))
  open_log(path, saved=saved)
  said = capsys.readouterr().err
  assert f'{path}: 7 lines up to step 8' in said
  assert 'after 8: some are missing' in said


def test_lines_of_earlier_versions_get_a_crc_and_stay_beside(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log_files.write_lines(path, ROWS)
  content = path.read_bytes()
  assert read_metrics(tmp_path) == ROWS
  assert open_log(path).rows() == ROWS
  assert path.with_name('metrics.jsonl.old').read_bytes() == content
  assert JsonLog(path).rows() == ROWS


def test_removed_lines_can_be_kept_beside(path):
  log = JsonLog(path)
  assert log.remove(lambda row: row['step'] % 2, keep=True) == 4
  assert log.rows() == ROWS[1::2]
  assert JsonLog(path.with_name('metrics.jsonl.old')).rows() == ROWS[::2]


def test_same_content_is_not_written_again(tmp_path):
  path = tmp_path / 'config.json'
  write_json(path, {'a': 1}, sealed=True)
  before = path.stat()
  write_json(path, {'a': 1}, sealed=True)
  assert path.stat() == before


@pytest.mark.parametrize('text', ['', '{"a": 1', '[1]', '{"a": 2}\n'])
def test_a_json_file_that_is_not_what_was_written_is_named(tmp_path, text):
  path = tmp_path / 'results.json'
  write_json(path, {'a': 1}, sealed=True)
  assert read_json(path) == {'a': 1}
  path.write_text(text)
  with pytest.raises(DamagedFileError, match=r'results\.json is') as error:
    read_json(path)
  assert '\n' not in str(error.value)


def test_sums_are_read_by_sha256sum(tmp_path):
  write_json(tmp_path / 'config.json', {'a': 1}, sealed=True)
  write_json(tmp_path / 'results.json', {'b': 2}, sealed=True)
  command = ['sha256sum', '-c', '--strict', log_files.SUMS]
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, check=True
  )
  assert done.stdout == 'config.json: OK\nresults.json: OK\n'


class FullDisk:
  """A file that takes eleven bytes more."""

  def __init__(self, file):
    self._file = file

  def __getattr__(self, name):
    return getattr(self._file, name)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._file.close()

  def write(self, text):
    if len(text) < 12:
      raise OSError(28, 'No space left on device')
    return self._file.write(text[:11])


def test_full_disk_leaves_no_half_line_and_no_half_file(
  path, monkeypatch, capsys
):
  content = path.read_bytes()
  opened = type(path).open
  with monkeypatch.context() as patch:
    patch.setattr(
      type(path), 'open', lambda *args, **kw: FullDisk(opened(*args, **kw))
    )
    with pytest.raises(WriteError, match=r'metrics\.jsonl cannot .*: No space'):
      JsonLog(path).append({'step': 9, 'split': 'train', 'loss': 'x' * 10})
  assert path.read_bytes() == content

  def write(partial):
    partial.write_text('half')
    raise OSError(28, 'No space left on device')

  with pytest.raises(WriteError, match=r'metrics\.jsonl cannot be written: No'):
    log_files.write_whole(path, write)
  assert path.read_bytes() == content
  assert list(path.parent.iterdir()) == [path]


def test_numbers_that_are_none_survive(path):
  row = {'step': 9, 'split': 'train', 'rate': None, 'nan': float('inf')}
  JsonLog(path).append(row)
  assert JsonLog(path).rows()[-1] == json.loads(json.dumps(row))
