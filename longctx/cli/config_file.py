"""Config files with their overrides: --config=FILE[:ARGUMENT] --config.x=y."""

import contextlib
import functools
import importlib.util
import inspect
import operator
import pathlib
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from longctx.training.config import unknown_key


def load(spec: str, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
  """The config of 'file.py[:argument]', changed by `--config.key=value`.

  config_flags would load the file itself, but reports a missing one or a
  misspelt key in dozens of lines; so it is given the loaded config.

  Raises:
    ValueError, OSError, flags.Error: with a message fit for one line.
  """
  config = load_config_file(spec)
  check_overrides(config, overrides)
  values = flags.FlagValues()
  argv = ['', *overrides]
  config_flags.DEFINE_config_dict('config', config, '', values, sys_argv=argv)
  try:
    rest = values(argv)[1:]
  except flags.IllegalFlagValueError as error:
    raise ValueError(_wrong_value(config, str(error))) from error
  if rest:
    raise ValueError(
      f'unexpected argument {rest[0]!r}: write --config.key=value'
    )
  return values['config'].value


def _wrong_value(config: config_dict.ConfigDict, message: str) -> str:
  """One line on a value that the flag parser could not read."""
  found = re.match(r'flag --config\.([\w.]+)=(.*?): ', message, re.DOTALL)
  if found is None:
    return message
  *groups, key = found[1].split('.')
  kind = functools.reduce(operator.getitem, groups, config).get_type(key)
  names = {int: 'an integer', float: 'a number', bool: 'true or false'}
  wanted = names.get(kind, f'a {kind.__name__} as Python writes it')
  return f'--config.{found[1]}={found[2]} must be {wanted}'


def load_config_file(spec: str) -> config_dict.ConfigDict:
  """Runs get_config() of 'file.py' or 'file.py:argument'.

  Raises:
    ValueError: it takes no such argument, is no config, or has a bug, which is
      told with its line.
    OSError: there is no such file.
  """
  path, colon, argument = spec.partition(':')
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(2, 'there is no such config file', path)
  module_spec = importlib.util.spec_from_file_location('longctx_config', path)
  if module_spec is None:
    raise ValueError(f'--config={path} must be a Python file')
  module = importlib.util.module_from_spec(module_spec)
  with _bugs_in_a_line(path):
    module_spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{path} must define get_config()')
  accepts = inspect.signature(module.get_config).parameters
  if colon and not accepts:
    raise ValueError(f'{path} takes no argument, got {argument!r}')
  with _bugs_in_a_line(path):
    config = module.get_config(*([argument] if colon else []))
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(
      f'{path}: get_config() must return a ConfigDict, and gave {config!r}: '
      'begin with default.get_config(), assign, and return it'
    )
  return config


@contextlib.contextmanager
def _bugs_in_a_line(path: str) -> Iterator[None]:
  """Tells what a config file raises in a line, with the place."""
  try:
    yield
  except (ValueError, NotImplementedError, OSError):
    # What it says of an argument, or of a value.
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == path]
    line = getattr(error, 'lineno', None) or (own or ['?'])[-1]
    raise ValueError(
      f'{path}, line {line}: {type(error).__name__}: {error}'
    ) from error


def check_overrides(config: config_dict.ConfigDict, argv: Sequence[str]):
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
