"""A slip on the command line costs one line and no compilation."""

import os
import subprocess
import sys

import pytest
from absl import flags

from longctx.cli import flags as cli
from longctx.training import runs
from longctx.training.config import ExperimentConfig, from_config_dict
from tests.tiny import tiny_config
from tests.training.test_trainer import ROOT

DEFAULT = str(ROOT / 'configs' / 'default.py')
CONFIG = f'--config={DEFAULT}'


def prepare(argv, tmp_path):
  """What train.py does before it compiles, in this process."""
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', str(tmp_path), '', flag_values=values)
  with cli.before_compiling():
    _, config = cli.parse_config_flags(['train.py', *argv], flag_values=values)
    config = from_config_dict(ExperimentConfig, config)
    runs.prepare(config, tmp_path)
  return config


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], '--config=FILE is missing'),
    (['--config=no.py'], 'no.py: there is no such config file'),
    (
      [CONFIG, '--config.stps=3'],
      'unknown config key stps; did you mean steps',
    ),
    (
      [CONFIG, '--config.optimizer.lr=3'],
      'unknown config key optimizer.lr; known: ',
    ),
    ([CONFIG, '--config.steps.x=3'], 'steps is a value, not a group'),
    ([CONFIG, '--config.steps=abc'], '--config.steps=abc: invalid literal'),
    ([CONFIG, '--config.steps'], 'Missing value for flag --config.steps'),
    ([CONFIG, '--stpes=3'], "Unknown command line flag 'stpes'"),
    ([CONFIG, 'steps=3'], "unexpected argument 'steps=3'"),
    ([f'{CONFIG}:mqra'], "unknown task 'mqra'; known: "),
    ([CONFIG, '--config.task.name=mqra'], "unknown task 'mqra'; known: "),
    (
      [CONFIG, '--config.model.layers=full,softmx'],
      "unknown variant 'softmx'; known: ",
    ),
    (
      [CONFIG, '--config.task.seq_len=20'],
      'seq_len=20 is too short for num_pairs=16',
    ),
    ([CONFIG, '--config.model.num_heads=5'], 'd_model=64 must be a multiple'),
    (
      [CONFIG, '--config.model.num_kv_heads=3'],
      'num_heads=4 must be a multiple of num_kv_heads=3',
    ),
    ([CONFIG, '--config.model.vocab_size=9'], 'vocab_size=9 is too small'),
    (
      [CONFIG, '--config.data.directory=/nowhere'],
      '/nowhere',
    ),
    ([f'{CONFIG}:bytes_lm', '--config.task.path=/nowhere'], '/nowhere'),
    ([CONFIG, '--config.optimizer.name=adam'], "unknown optimizer 'adam'"),
  ],
)
def test_slip_is_one_clear_line_and_exit_code_2(
  argv, message, tmp_path, capsys
):
  with pytest.raises(SystemExit) as stop:
    prepare(argv, tmp_path)
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert message in error
  assert error.count('\n') == 1


def test_workdir_that_is_a_file_is_one_line(tmp_path, capsys):
  path = tmp_path / 'taken'
  path.write_text('')
  with pytest.raises(SystemExit):
    prepare([CONFIG], path)
  assert str(path) in capsys.readouterr().err


def test_unreadable_workdir_is_one_line(tmp_path, capsys, monkeypatch):
  # Root may read anything, so the refusal itself is simulated.
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  with pytest.raises(SystemExit):
    prepare([CONFIG], tmp_path)
  expected = f'error: {tmp_path}: cannot be read and written\n'
  assert capsys.readouterr().err == expected


def test_overrides_reach_the_config(tmp_path):
  argv = [
    CONFIG,
    '--config.steps=7',
    '--config.model.head_dim=8',
    '--config.model.layers=full,sliding_window(window=4)',
    '--config.optimizer.learning_rate=1',
  ]
  config = prepare(argv, tmp_path)
  assert config.steps == 7
  assert config.model.head_dim == 8
  assert config.model.layers == ('full', 'sliding_window(window=4)')
  assert config.optimizer.learning_rate == 1.0


def test_bug_in_a_config_file_keeps_its_traceback(tmp_path):
  path = tmp_path / 'broken.py'
  path.write_text('def get_config():\n  return undefined_name\n')
  with pytest.raises(NameError, match='undefined_name'):
    prepare([f'--config={path}'], tmp_path)


def test_argument_for_a_config_that_takes_none_is_refused(tmp_path, capsys):
  path = tmp_path / 'plain.py'
  path.write_text('def get_config():\n  return 0\n')
  with pytest.raises(SystemExit):
    prepare([f'--config={path}:big'], tmp_path)
  assert "takes no argument, got 'big'" in capsys.readouterr().err


def test_workdir_is_named_after_config_and_argument():
  assert str(cli.default_workdir('configs/mqar.py')) == 'runs/mqar'
  assert str(cli.default_workdir('configs/mqar.py:full')) == 'runs/mqar-full'


@pytest.mark.parametrize(
  ('script', 'argv', 'message'),
  [
    ('train.py', [CONFIG, '--config.model.dmodel=3'], 'did you mean'),
    ('eval.py', ['--workdir=/nowhere'], 'no workdir of train.py'),
    ('eval.py', [], '--workdir=DIR is missing'),
  ],
)
def test_script_itself_ends_with_one_line(script, argv, message, tmp_path):
  done = subprocess.run(
    [sys.executable, str(ROOT / script), *argv],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count('\n') == 1
  assert done.stdout == ''
  assert list(tmp_path.iterdir()) == []


def test_eval_of_a_run_without_a_checkpoint_is_one_line(tmp_path):
  runs.prepare(tiny_config(), tmp_path)
  done = subprocess.run(
    [sys.executable, str(ROOT / 'eval.py'), f'--workdir={tmp_path}'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert 'no checkpoint in' in done.stderr
  assert done.stderr.count('\n') == 1
