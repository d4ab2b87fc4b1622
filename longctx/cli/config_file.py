"""Config files with their overrides: --config=FILE[:ARGUMENT] --config.x=y."""

import importlib.util
import inspect
import pathlib
from collections.abc import Sequence
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
  if rest := values(argv)[1:]:
    raise ValueError(
      f'unexpected argument {rest[0]!r}: write --config.key=value'
    )
  return values['config'].value


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
