"""A slip on the command line costs one line and no compilation."""

import functools
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from longctx.cli import config_file, flags
from longctx.cli import train as command
from longctx.cli.commands import COMMANDS
from longctx.evaluation import sweep
from longctx.models import TransformerConfig
from longctx.models.gate import GateConfig
from longctx.training import runs
from longctx.training.config import ExperimentConfig, from_config_dict
from tests.tiny import tiny_config
from tests.training.test_trainer import ROOT

DEFAULT = str(ROOT / 'configs' / 'default.py')
CONFIG = f'--config={DEFAULT}'


def prepare(argv, tmp_path):
  """What train.py does before it compiles, in this process."""
  with flags.before_compiling():
    args = flags.parse('train', [f'--workdir={tmp_path}', *argv])
    command.prepare(args)
  config = config_file.load(args.config, args.overrides)
  return from_config_dict(ExperimentConfig, config)


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], '--config=FILE[:ARGUMENT] is missing'),
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
    ([CONFIG, '--config.steps=abc'], '--config.steps=abc must be an integer'),
    ([CONFIG, '--config.steps'], 'Missing value for flag --config.steps'),
    ([CONFIG, '--wrkdir=3'], 'unknown flag --wrkdir=3; did you mean --workdir'),
    ([CONFIG, '--nonsense=3'], 'unknown flag --nonsense=3; --help has all'),
    ([CONFIG, 'steps=3'], "unexpected argument 'steps=3'"),
    ([CONFIG, '--config.steps=3', 'x'], "unexpected argument 'x'"),
    ([CONFIG, '--num_processes=0'], '--num_processes=0 must be at least 1'),
    ([CONFIG, '--process_id=1'], 'give --coordinator=HOST:PORT'),
    (
      [CONFIG, *['--coordinator=a:1', '--num_processes=2', '--process_id=2']],
      '--process_id=2 must be below --num_processes=2',
    ),
    ([CONFIG, f'--config.seed={10**29}'], 'seed=1000'),
    ([CONFIG, '--config.model.d_model=0'], 'model.d_model=0 must be at least'),
    ([CONFIG, '--config.optimizer.eps=x'], 'optimizer.eps=x must be a number'),
    (
      [CONFIG, '--config.parallel.scheme=striped'],
      'striped is a parallel.layout',
    ),
    (
      [CONFIG, '--config.parallel.data=2', '--config.eval.batch_size=3'],
      'eval.batch_size=3 must be a multiple of parallel.data=2: 2 or 4',
    ),
    (
      [CONFIG, '--num_processes=x'],
      "--num_processes: invalid integer value: 'x'",
    ),
    ([f'{CONFIG}:mqra'], "unknown task 'mqra'; did you mean mqar? known: "),
    (
      [CONFIG, '--config.task.name=mqra'],
      "unknown task 'mqra'; did you mean mqar? known: ",
    ),
    (
      [CONFIG, '--config.model.layers=full,softmx'],
      "unknown variant 'softmx'; did you mean softmax1? known: ",
    ),
    (
      [CONFIG, '--config.task.seq_len=20'],
      'seq_len=20 is too short for num_pairs=16',
    ),
    ([CONFIG, '--config.model.num_heads=5'], 'd_model=64 must be a multiple'),
    (
      [CONFIG, '--config.model.num_kv_heads=3'],
      'num_heads=4 must be a multiple of model.num_kv_heads=3: 3 or 6',
    ),
    ([CONFIG, '--config.model.vocab_size=9'], 'vocab_size=9 is too small'),
    (
      [CONFIG, '--config.data.directory=/nowhere'],
      '/nowhere',
    ),
    ([f'{CONFIG}:bytes_lm', '--config.task.path=/nowhere'], '/nowhere'),
    (
      [CONFIG, '--config.optimizer.name=adam'],
      "unknown optimizer.name='adam'; did you mean ",
    ),
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


@pytest.mark.parametrize(
  ('name', 'argv', 'message'),
  [
    ('eval', ['swep'], "unknown mode 'swep'; known: sweep, stream, s2a"),
    ('eval', ['--workdir=x', 'sweep'], "mode 'sweep' comes first"),
    ('eval', ['--mode=s2a'], 'unknown flag --mode=s2a'),
    ('eval', ['--workdir=x', '--batches=0'], '--batches=0 must be at least 1'),
    ('eval sweep', ['--seq_len=3'], 'unknown flag --seq_len=3'),
    ('eval stream', ['--slots=x', '--workdir=x'], '--slots: invalid int value'),
    (
      'eval s2a',
      ['--distractors=1,x'],
      '--distractors: invalid integers value',
    ),
    ('eval stream', [], '--workdir=DIR is missing: Take the runs in this'),
    ('data', [], 'arguments are required: prepare'),
    ('data', ['prepare', '--data_dir=x', 'y'], "unexpected argument 'y'"),
    ('analysis', ['--split=x'], "--split: invalid choice: 'x'"),
    ('analysis', ['--rows=0'], '--rows=0 must be at least 1'),
    ('analysis', ['--seq_len=0'], '--seq_len=0 must be at least 1'),
    ('generate', [f'--seed={10**29}'], 'must be at most 4294967295'),
    ('data', ['prepare', '--seed=-1'], '--seed=-1 must be at least 0'),
    (
      'data',
      ['prepare', '--tsk=mqar'],
      'unknown flag --tsk=mqar; did',
    ),
    ('plan', ['--utilization=nan'], '--utilization=nan must be in (0, 1]'),
    ('plan', [CONFIG], '--topology=GENERATION:SHAPE is missing'),
  ],
)
def test_slip_is_found_without_jax(name, argv, message):
  # `parse` itself imports none: see the test of --help.
  with pytest.raises(ValueError) as error:
    flags.parse(name, argv)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_flags_of_modes_are_the_fields_of_their_configs():
  argv = ['--workdir=w', '--policies=dense,sinks', '--slots', '8']
  args = vars(flags.parse('eval stream', argv))
  assert (args['policies'], args['slots']) == (('dense', 'sinks'), 8)
  assert 'chunk' not in args
  args = flags.parse(
    'eval s2a', ['--workdir=w', '--distractors=0,8', '--run=a,b']
  )
  assert (args.distractors, args.run) == ((0, 8), ('a', 'b'))
  args = flags.parse('eval sweep', ['--workdir=w', '--task.seq_len=8,16'])
  assert args.overrides == ['--task.seq_len=8,16']


@pytest.mark.parametrize('name', COMMANDS)
def test_flags_say_in_a_sentence_what_they_do(name, capsys):
  for flag in COMMANDS[name].flags:
    assert flag.text[0].isupper() and flag.text.endswith('.'), flag.name
    assert len(flag.text.split()) >= 4, flag.name
  with pytest.raises(SystemExit) as stop:
    flags.parse(name, ['--help'])
  assert stop.value.code == 0
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines[1:])) <= 80
  for flag in COMMANDS[name].flags:
    assert any(line.startswith(f'  --{flag.name}') for line in lines)
  # The docstring of the command's module shows how it is called.
  assert COMMANDS[name].prog in ' '.join(lines[1:])


PROGRAM = """
import runpy, sys
sys.argv = ['train.py', '--help']
try:
  runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as stop:
  assert stop.code == 0
assert not {'jax', 'numpy', 'ml_collections'} & {*sys.modules}
"""


def test_help_has_every_key_of_the_config_and_needs_no_jax():
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()

  def check(group, indent):
    for key, value in group.items():
      head = f'{indent}{key}'
      at = [i for i, line in enumerate(lines) if line.startswith(head)]
      at = [i for i in at if lines[i][len(head) :][:1] in ('', ' ', '=')]
      assert at, f'{head!r} is missing'
      for i in at:
        text = lines[i][28:] if len(lines[i]) > 28 else lines[i + 1][28:]
        assert text.strip(), f'{head!r} has no line: {lines[i]!r}'
      if isinstance(value, dict) and key not in ('task', 'runs'):
        check(value, f'{indent}  ')

  defaults = runs.config_lib.to_config_dict(ExperimentConfig())
  check(defaults.to_dict(), '  ')
  assert '    d_model=64              width D of the residual stream.' in lines
  assert "    name='adamw'" in done.stdout


def test_help_with_a_config_shows_what_it_sets(capsys):
  path = ROOT / 'configs' / 'mqar.py'
  with pytest.raises(SystemExit):
    flags.parse('train', [f'--config={path}', '--help'])
  text = capsys.readouterr().out
  config = config_file.load(str(path))
  assert f'  steps={config.steps} ' in text
  assert f'    num_pairs={config.task.num_pairs}' in text


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
    *('--config.model.head_dim', '8'),
    '--config.model.layers=full,sliding_window(window=4)',
    '--config.optimizer.learning_rate=1',
    '--noconfig.log.progress',
  ]
  config = prepare(argv, tmp_path)
  assert config.steps == 7
  assert config.model.head_dim == 8
  assert config.model.layers == ('full', 'sliding_window(window=4)')
  assert config.optimizer.learning_rate == 1.0
  assert not config.log.progress


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('  return undefined_name', 'line 2: NameError: name'),
    ('  return 1 / 0', 'line 2: ZeroDivisionError: division by zero'),
    ('  return (', 'line 2: SyntaxError: '),
    ('  import no_such_module', 'line 2: ModuleNotFoundError: '),
    ('  pass', 'get_config() must return a ConfigDict, and gave None'),
    ('  return {"steps": 3}', 'must return a ConfigDict, and gave'),
  ],
)
def test_bug_in_a_config_file_is_one_line_with_its_place(
  text, message, tmp_path, capsys
):
  path = tmp_path / 'broken.py'
  path.write_text(f'def get_config():\n{text}\n')
  with pytest.raises(SystemExit):
    prepare([f'--config={path}'], tmp_path)
  error = capsys.readouterr().err
  assert str(path) in error and message in error
  assert error.count('\n') == 1


def test_argument_for_a_config_that_takes_none_is_refused(tmp_path, capsys):
  path = tmp_path / 'plain.py'
  path.write_text('def get_config():\n  return 0\n')
  with pytest.raises(SystemExit):
    prepare([f'--config={path}:big'], tmp_path)
  assert "takes no argument, got 'big'" in capsys.readouterr().err


def test_workdir_is_named_after_config_and_argument():
  assert str(command.default_workdir('configs/mqar.py')) == 'runs/mqar'
  assert (
    str(command.default_workdir('configs/mqar.py:full')) == 'runs/mqar-full'
  )


@pytest.mark.parametrize(
  ('script', 'argv', 'message'),
  [
    ('train.py', [CONFIG, '--config.model.dmodel=3'], 'did you mean'),
    ('eval.py', ['--workdir=/nowhere'], 'no workdir of train.py'),
    ('eval.py', ['sweep'], '--workdir=DIR is missing'),
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


def test_eval_of_a_run_without_a_checkpoint_is_one_line(tmp_path, capsys):
  runs.prepare(tiny_config(), tmp_path)
  with pytest.raises(SystemExit) as stop:
    flags.run('eval', [f'--workdir={tmp_path}'])
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert 'no checkpoint in' in error
  assert error.count('\n') == 1


@pytest.mark.parametrize('words', [[], ['train', '--help'], ['eval', '--help']])
def test_help_that_nobody_reads_to_its_end_is_no_error(words):
  read, write = os.pipe()
  process = subprocess.Popen(
    [sys.executable, '-m', 'longctx', *words],
    cwd=ROOT,
    stdout=write,
    stderr=subprocess.PIPE,
  )
  os.close(write)
  os.close(read)
  assert process.communicate()[1] == b''
  # argparse takes no notice where output is not buffered.
  assert process.returncode in (0, 128 + signal.SIGPIPE)


@pytest.mark.parametrize('when', ['prepare', 'work'])
@pytest.mark.parametrize(
  'signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name
)
@pytest.mark.parametrize('name', COMMANDS)
def test_a_signal_ends_every_command_by_one_line(
  name, signum, when, monkeypatch, capsys, request
):
  def stop(*args):
    os.kill(os.getpid(), signum)
    time.sleep(5)

  module = types.SimpleNamespace(
    prepare=stop if when == 'prepare' else lambda args: stop
  )
  monkeypatch.setitem(
    sys.modules, f'longctx.cli.{COMMANDS[name].module}', module
  )
  monkeypatch.setattr(flags, 'parse', lambda name, argv: None)
  # As a terminal starts a command: a suite in the background ignores them.
  usual = {signal.SIGINT: signal.default_int_handler}
  for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    found = signal.signal(one, usual.get(one, signal.SIG_DFL))
    request.addfinalizer(functools.partial(signal.signal, one, found))
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
  with pytest.raises(SystemExit) as ended:
    flags.main(name.split())
  assert ended.value.code == 128 + signum
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith(f'{signum.name}: interrupted')
  assert err.count('\n') == 1
  assert before == {s: signal.getsignal(s) for s in before}


@pytest.mark.parametrize(
  ('error', 'line'),
  [
    (OSError(28, 'No space left on device'), 'error: No space left on device'),
    (OSError('tape is torn'), 'error: tape is torn'),
    (PermissionError(13, 'not allowed', 'a'), 'error: a: not allowed'),
    (ValueError(), 'error: ValueError'),
  ],
)
def test_an_error_is_told_by_what_it_knows(error, line, capsys):
  with pytest.raises(SystemExit), flags.before_compiling():
    raise error
  assert capsys.readouterr().err == f'{line}\n'


@pytest.mark.parametrize(
  ('name', 'hint'), [('trian', '; did you mean train?'), ('xyz', '')]
)
def test_unknown_command_names_the_closest(name, hint, capsys):
  assert flags.main([name]) == 2
  first = capsys.readouterr().err.splitlines()[0]
  assert first == f'error: unknown command {name!r}{hint}'


def test_analysis_of_a_gated_run_is_refused(tmp_path, monkeypatch, capsys):
  run = types.SimpleNamespace(
    workdir=tmp_path, model=TransformerConfig(gate=GateConfig(keep=2))
  )
  monkeypatch.setattr(sweep, 'open_workdir', lambda workdir: [run])
  with pytest.raises(SystemExit):
    flags.run('analysis', [f'--workdir={tmp_path}'])
  assert 'has a gate, which lets few tokens' in capsys.readouterr().err
