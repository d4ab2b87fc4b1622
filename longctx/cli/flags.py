"""Command lines that end with one clear line when the user slipped.

Exit codes: 2 for a command line, config or workdir that cannot work (nothing
was compiled), 1 for a run that diverged or whose checkpoints are damaged,
128 + n for one stopped by signal n, having saved itself. All else is a bug and
keeps its traceback.
"""

import contextlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags
from ml_collections import config_dict, config_flags

from longctx.training.config import unknown_key
from longctx.training.errors import (
  CheckpointError,
  NotFiniteError,
  StoppedError,
)


def _exit(error: BaseException, code: int):
  message = ' '.join(str(error).split())
  if isinstance(error, OSError) and error.strerror:
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
    flags.Error,
  ) as error:
    _exit(error, 2)


@contextlib.contextmanager
def while_running() -> Iterator[None]:
  """Turns the ends that a healthy program can have into one line."""
  try:
    yield
  except StoppedError as error:
    _exit(error, 128 + error.signum)
  except (NotFiniteError, CheckpointError) as error:
    _exit(error, 1)


def parse_flags(
  argv: list[str], *, flag_values: flags.FlagValues = flags.FLAGS
):
  """Parses the command line into absl's flags.

  Raises:
    ValueError, flags.Error: with a message fit for one line.
  """
  app.define_help_flags()
  rest = flag_values(argv)[1:]
  if rest:
    raise ValueError(
      f'unexpected argument {rest[0]!r}: write --name=value, and '
      '--config.key=value to change the config'
    )


def parse_config_flags(
  argv: list[str], *, flag_values: flags.FlagValues = flags.FLAGS
) -> tuple[str, config_dict.ConfigDict]:
  """Parses --config=file.py[:argument], its overrides and all other flags.

  config_flags would load the file itself, but reports a missing one or a
  misspelt key in dozens of lines; so it is given the loaded config.

  Returns:
    ('file.py[:argument]', the config with its overrides).

  Raises:
    ValueError, OSError, flags.Error: with a message fit for one line.
  """
  spec, rest = _take(argv, 'config')
  wants_help = any(word.lstrip('-').startswith('help') for word in argv)
  if not spec and not wants_help:
    raise ValueError('--config=FILE is missing, e.g. configs/quickstart.py')
  config = load_config_file(spec) if spec else config_dict.ConfigDict()
  check_overrides(config, rest)
  config_flags.DEFINE_config_dict(
    'config', config, 'file.py[:argument]', flag_values, sys_argv=rest
  )
  parse_flags(rest, flag_values=flag_values)
  return spec, flag_values['config'].value


def _take(argv: list[str], name: str) -> tuple[str, list[str]]:
  """The value of --name=value or --name value, and the line without it."""
  for index, word in enumerate(argv[1:], 1):
    flag, equals, value = word.lstrip('-').partition('=')
    if word.startswith('-') and flag == name:
      end = index + 1 if equals else index + 2
      value = value if equals else ''.join(argv[index + 1 : end])
      return value, argv[:index] + argv[end:]
  return '', argv


def load_config_file(spec: str) -> config_dict.ConfigDict:
  """Runs get_config() of 'file.py' or 'file.py:argument'.

  Raises:
    ValueError: it takes no such argument, or is no config.
    OSError: there is no such file.
  """
  path, colon, argument = spec.partition(':')
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(2, 'there is no such config file', path)
  module_spec = importlib.util.spec_from_file_location('longctx_config', path)
  if module_spec is None:
    raise ValueError(f'--config={path} must be a Python file')
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{path} must define get_config()')
  accepts = inspect.signature(module.get_config).parameters
  if colon and not accepts:
    raise ValueError(f'{path} takes no argument, got {argument!r}')
  return module.get_config(*([argument] if colon else []))


def check_overrides(config: config_dict.ConfigDict, argv: list[str]):
  """Refuses a `--config.key` that the config lacks, naming the closest."""
  for word in argv:
    flag = word.lstrip('-').partition('=')[0]
    if not word.startswith('-') or '.' not in flag:
      continue
    head, *keys = flag.split('.')
    if head not in ('config', 'noconfig'):
      continue
    group: Any = config
    for depth, key in enumerate(keys):
      if not isinstance(group, config_dict.ConfigDict):
        raise ValueError(
          f'config key {".".join(keys[:depth])} is a value, not a group: '
          f'{".".join(keys)} does not exist'
        )
      if key not in group:
        path = '.'.join(keys[: depth + 1])
        raise ValueError(unknown_key(path, list(group.keys())))
      group = group[key]


def default_workdir(spec: str) -> pathlib.Path:
  """runs/<config>, or runs/<config>-<argument>, beside nothing else."""
  path, _, argument = spec.partition(':')
  name = pathlib.Path(path).stem + (f'-{argument}' if argument else '')
  return pathlib.Path('runs') / name
