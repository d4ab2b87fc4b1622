"""Command-line parser, and errors that end in one clear line.

Exit codes: 2 for a command line, config or workdir that cannot work (nothing
was compiled), 1 for a run that diverged, whose checkpoints or data are damaged
or whose disk is full, 128 + n for one stopped by signal n. All else is a bug
and keeps its traceback.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from absl import flags as absl_flags

from longctx.cli import fields
from longctx.cli.commands import COMMANDS, REQUIRED, Command, Flag
from longctx.data.errors import DamagedDataError
from longctx.training.errors import (
  CheckpointError,
  LockedError,
  NotFiniteError,
  StoppedError,
  WriteError,
)


def _exit(error: BaseException, code: int):
  message = ' '.join(str(error).split()) or type(error).__name__
  if isinstance(error, OSError) and error.strerror:
    where = f'{error.filename}: ' if error.filename else ''
    message = where + error.strerror
  if isinstance(error, StoppedError):
    print(message, file=sys.stderr)
  else:
    print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


class _Signalled(KeyboardInterrupt):
  """A signal that would have ended the process without a word."""


def _raise(signum, frame):
  raise _Signalled(signum)


@contextlib.contextmanager
def _quiet_end(after_stop: str = '') -> Iterator[None]:
  """Turns a signal into one line, and output that nobody reads into none."""
  previous = {}
  if threading.current_thread() is threading.main_thread():
    previous = {
      signum: signal.signal(signum, _raise)
      for signum in (signal.SIGTERM, signal.SIGHUP)
      # `nohup` wants no end.
      if signal.getsignal(signum) == signal.SIG_DFL
    }
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except KeyboardInterrupt as error:
    signum = error.args[0] if isinstance(error, _Signalled) else signal.SIGINT
    words = [f'{signal.Signals(signum).name}: interrupted', after_stop]
    print('; '.join(filter(None, words)), file=sys.stderr)
    sys.exit(128 + signum)
  except BrokenPipeError:
    if not any(map(_is_closed, (1, 2))):
      raise
    # Python flushes once more at its end.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in filter(_is_closed, (1, 2)):
      os.dup2(nowhere, fd)
    sys.exit(128 + signal.SIGPIPE)
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)


@contextlib.contextmanager
def _later() -> Iterator[None]:
  """Holds signals back: Python may lose an exception within an import."""
  signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
  before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_closed(fd: int) -> bool:
  """Whether nobody reads what is written there."""
  poll = select.poll()
  poll.register(fd, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


@contextlib.contextmanager
def before_compiling() -> Iterator[None]:
  """Turns what is wrong with flags, config or workdir into one line."""
  try:
    yield
  except BrokenPipeError:
    raise
  except (
    ValueError,
    NotImplementedError,
    OSError,
    CheckpointError,
    LockedError,
    WriteError,
    absl_flags.Error,
  ) as error:
    _exit(error, 2)


@contextlib.contextmanager
def while_running() -> Iterator[None]:
  """Turns the ends that a healthy program can have into one line."""
  try:
    yield
  except StoppedError as error:
    _exit(error, 128 + error.signum)
  except (
    NotFiniteError,
    CheckpointError,
    DamagedDataError,
    LockedError,
    WriteError,
  ) as error:
    _exit(error, 1)


def main(argv: list[str]) -> int:
  """Runs the command that is named, or lists them."""
  name, rest = ' '.join(argv[:2]), argv[2:]
  if name not in COMMANDS:
    name, rest = ' '.join(argv[:1]), argv[1:]
  try:
    with _quiet_end(COMMANDS[name].after_stop if name in COMMANDS else ''):
      return run(name, rest) if name in COMMANDS else _list(name)
  except BaseException as error:
    # Not imported by --help and what is misspelt.
    if processes := sys.modules.get('longctx.parallel.processes'):
      processes.part(error)
    raise


def _list(name: str) -> int:
  asked = name in ('', '-h', '--help')
  out = sys.stdout if asked else sys.stderr
  if not asked:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f'; did you mean {close[0]}?' if close else ''
    print(f'error: unknown command {name!r}{hint}', file=out)
  print('usage: python -m longctx COMMAND ..., each with a --help\n', file=out)
  for key, command in COMMANDS.items():
    print(f'  {key:<13}{command.text}', file=out)
  return 0 if asked else 2


def run(name: str, argv: Sequence[str]) -> int:
  """Runs one of COMMANDS."""
  with before_compiling():
    args = parse(name, argv)
    with _later():
      module = importlib.import_module(f'longctx.cli.{COMMANDS[name].module}')
    work = module.prepare(args)
  with while_running():
    work()
  return 0


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
  """Reads the command line of one of COMMANDS.

  Raises:
    ValueError: with a message fit for one line.
  """
  command = COMMANDS[name]
  parser = _parser(name)
  args, rest = parser.parse_known_args(argv)
  known = [f'--{flag.name}' for flag in command.flags]
  for word in rest:
    key, _, field = word.partition('.')
    if word[:1] != '-' or (field and key.lstrip('-') in _heads(command)):
      continue
    close = difflib.get_close_matches(word.partition('=')[0], known, n=1)
    raise ValueError(
      f'unknown flag {word}; '
      + (f'did you mean {close[0]}?' if close else '--help has all')
    )
  if rest and rest[0][:1] != '-':
    modes = [key.split()[1] for key in COMMANDS if key.startswith(f'{name} ')]
    if rest[0] in modes:
      raise ValueError(f'mode {rest[0]!r} comes first, before all flags')
    if modes:
      raise ValueError(f'unknown mode {rest[0]!r}; known: {", ".join(modes)}')
    raise ValueError(
      f'unexpected argument {rest[0]!r}: write --name=value'
      + ''.join(f', or --{prefix}.key=value' for prefix in command.prefixes)
    )
  for flag in command.flags:
    if getattr(args, flag.name, None) is REQUIRED:
      raise ValueError(f'--{flag.name}={flag.metavar} is missing: {flag.text}')
  args.overrides, args.argv = rest, list(argv)
  return args


def _heads(command: Command) -> set[str]:
  return {*command.prefixes, *(f'no{prefix}' for prefix in command.prefixes)}


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    # What refuses a value knows no flag: '0 must be at least 1'.
    message = re.sub(r'^argument (--\w+): (?=\S+ must be)', r'\1=', message)
    raise ValueError(message.removeprefix('argument '))


class _Formatter(argparse.RawDescriptionHelpFormatter):
  def __init__(self, prog: str):
    super().__init__(prog, max_help_position=28, width=80)

  def _format_action_invocation(self, action: argparse.Action) -> str:
    if not action.option_strings or action.nargs == 0:
      return super()._format_action_invocation(action)
    return f'{action.option_strings[0]}={action.metavar}'


class _Help(argparse.Action):
  """--help, which goes on with the keys of the config that is named."""

  def __call__(self, parser, namespace, values, option_string=None):
    parser.print_help()
    if parser.get_default('config') is REQUIRED:
      loaded = {}
      if namespace.config is not REQUIRED:
        config_file = importlib.import_module('longctx.cli.config_file')
        loaded = config_file.load(namespace.config).to_dict()
      source = f'what {namespace.config} sets' if loaded else 'the defaults'
      print(f'\nkeys, --config.model.d_model=128, with {source}:')
      keys = fields.read('longctx.training.config', 'ExperimentConfig')
      print(*fields.table(keys, loaded), sep='\n')
    parser.exit()


def _parser(name: str) -> argparse.ArgumentParser:
  command = COMMANDS[name]
  doc = ast.get_docstring(
    ast.parse(fields.source(f'longctx.cli.{command.module}'))
  )
  parser = _Parser(
    prog=command.prog,
    usage=' '.join([command.prog, *command.positional, _usage(command)]),
    description=doc,
    formatter_class=_Formatter,
    allow_abbrev=False,
    add_help=False,
  )
  for word in command.positional:
    parser.add_argument(word, choices=[word], help=argparse.SUPPRESS)
  if flag := command.argument:
    parser.add_argument(flag.name, metavar=flag.metavar, help=flag.text)
  flags = parser.add_argument_group('flags')
  for flag in command.flags:
    _add(flags, flag)
  flags.add_argument('--help', '-h', nargs=0, action=_Help, help='Show this.')
  return parser


def _add(group: argparse._ArgumentGroup, flag: Flag):
  options = dict(default=flag.default, help=flag.text.replace('%', '%%'))
  if flag.kind is bool:
    options = dict(action='store_true', help=flag.text)
  else:
    options |= dict(type=flag.kind, metavar=flag.metavar)
    if '|' in flag.metavar:
      options['choices'] = flag.metavar.split('|')
  group.add_argument(f'--{flag.name}', **options)


def _usage(command: Command) -> str:
  needed = [
    f'--{flag.name}={flag.metavar}'
    for flag in command.flags
    if flag.default is REQUIRED
  ]
  words = [command.argument.metavar] if command.argument else []
  optional = ['[--FLAG=VALUE ...]'] if len(command.flags) > len(needed) else []
  keys = [f'[--{prefix}.KEY=VALUE ...]' for prefix in command.prefixes]
  return ' '.join([*words, *needed, *optional, *keys])
