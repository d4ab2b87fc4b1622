"""Command-line parser, and errors that end in one clear line.

Exit codes: 2 for a command line, config or workdir that cannot work (nothing
was compiled), 1 for a run that diverged, whose checkpoints are damaged or whose
disk is full, 128 + n for one stopped by signal n, having saved itself. All else
is a bug and keeps its traceback.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags as absl_flags

from longctx.cli import fields
from longctx.cli.commands import COMMANDS, REQUIRED, Command, Flag
from longctx.training.errors import (
  CheckpointError,
  LockedError,
  NotFiniteError,
  StoppedError,
  WriteError,
)


def _exit(error: BaseException, code: int):
  message = ' '.join(str(error).split())
  if isinstance(error, OSError) and error.filename and error.strerror:
    message = f'{error.filename}: {error.strerror}'
  if isinstance(error, StoppedError):
    print(message, file=sys.stderr)
  else:
    print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


@contextlib.contextmanager
def before_compiling() -> Iterator[None]:
  """Turns what is wrong with flags, config or workdir into one line."""
  try:
    yield
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
  except (NotFiniteError, CheckpointError, LockedError, WriteError) as error:
    _exit(error, 1)


def main(argv: list[str]) -> int:
  """Runs the command that is named, or lists them."""
  name, rest = ' '.join(argv[:2]), argv[2:]
  if name not in COMMANDS:
    name, rest = ' '.join(argv[:1]), argv[1:]
  if name in COMMANDS:
    run(name, rest)
    return 0
  asked = name in ('', '-h', '--help')
  out = sys.stdout if asked else sys.stderr
  if not asked:
    print(f'error: unknown command {name!r}', file=out)
  print('usage: python -m longctx COMMAND ..., each with a --help\n', file=out)
  for key, command in COMMANDS.items():
    print(f'  {key:<13}{command.text}', file=out)
  return 0 if asked else 2


def run(name: str, argv: Sequence[str]):
  """Runs one of COMMANDS."""
  with before_compiling():
    args = parse(name, argv)
    module = importlib.import_module(f'longctx.cli.{COMMANDS[name].module}')
    work = module.prepare(args)
  with while_running():
    work()


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
  keys = [f'[--{prefix}.KEY=VALUE ...]' for prefix in command.prefixes]
  return ' '.join([*needed, '[--FLAG=VALUE ...]', *keys])
