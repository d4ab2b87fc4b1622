"""Every field of every config says its type and range, and is held to them."""

import dataclasses
import importlib
import inspect
import math
import re
import typing
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from longctx.attention import VARIANTS
from longctx.typing import (
  Between,
  Checked,
  Fraction,
  Natural,
  Positive,
  PositiveNumber,
  Reason,
  Seed,
  field_types,
)
from tests.house import LIBRARY

# Texts that may be any: paths, and names of what lies outside.
FREE = {
  'DataConfig.directory',
  'TextTask.path',
  'TextTask.tfds_name',
  'TextTask.tfds_data_dir',
  'TextLM.tokenizer',
  'TextLM.separator',
  # Parsed where a layer is made.
  'TransformerConfig.layers',
  'AttentionConfig.rope_scaling',
  'block_sparse.pattern',
  # Any number.
  'Recurrence.scale',
  # Of tasks and of runs, which are checked as they are made.
  'ExperimentConfig.task',
  'ExperimentConfig.runs',
  # A place, looked up before anything compiles.
  'ExperimentConfig.init_from',
}
MODULES = [
  importlib.import_module(name)
  for name in LIBRARY
  if not name.endswith('__main__')
]


def every_class(cls=Checked):
  for child in cls.__subclasses__():
    if child.__module__.startswith('longctx'):
      yield child
      yield from every_class(child)


CLASSES = sorted(
  {c for c in every_class() if dataclasses.fields(c)}, key=lambda c: c.__name__
)


def leaves(hint: Any):
  """The types that an annotation is made of, ranges left on them."""
  if typing.get_origin(hint) in (Annotated, Literal) or hint is Any:
    yield hint
  elif args := typing.get_args(hint):
    for arg in args:
      yield from leaves(arg)
  else:
    yield hint


def without_range(hint: Any) -> bool:
  """Whether a number or a text may be any."""
  return any(leaf in (int, float, str) for leaf in leaves(hint))


def arguments(variant):
  hints = field_types(VARIANTS[variant].__init__)
  names = inspect.signature(VARIANTS[variant].__init__).parameters
  return {k: hints[k] for k in names if k not in ('self', 'config', 'rngs')}


@pytest.mark.parametrize('cls', CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_of_a_config_has_a_range(cls):
  hints = field_types(cls)
  for field in dataclasses.fields(cls):
    owner = next(
      c for c in cls.__mro__ if field.name in vars(c).get('__annotations__', {})
    )
    if f'{owner.__name__}.{field.name}' not in FREE:
      assert not without_range(hints[field.name]), (
        f'{owner.__name__}.{field.name}: {hints[field.name]} says no range: '
        'take one of longctx.typing, such as Positive'
      )


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_argument_of_a_variant_has_a_range(variant):
  for name, hint in arguments(variant).items():
    if f'{variant}.{name}' in FREE or 'Mapping' in str(hint):
      continue
    assert not without_range(hint), f'{variant}({name}: {hint}) says no range'


def test_every_dataclass_that_is_called_a_config_is_checked():
  classes = {
    cls
    for module in MODULES
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__name__.endswith('Config')
  }
  for cls in classes:
    # TFDS's, of a prepared dataset.
    if cls.__name__ == 'TaskConfig':
      continue
    if dataclasses.is_dataclass(cls) and cls.__module__.startswith('longctx'):
      assert issubclass(cls, Checked), cls
  assert len(classes) > 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried(Checked):
  prefix = 'tried.'

  size: Positive = 1
  maybe: Natural | None = None
  several: Positive | tuple[Positive, ...] = 1
  share: Fraction = 0.0
  rate: PositiveNumber = 1.0
  seed: Seed = 0
  depth: Annotated[float, Between(-1, 1)] = 0.0
  name: Annotated[Literal['xla', 'pallas'], Reason('cuda', ': no kernel')] = (
    'xla'
  )
  flag: bool = False
  names: tuple[str, ...] = ()


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('size', 0, 'tried.size=0 must be at least 1'),
    ('size', 2.5, 'tried.size=2.5 must be an integer, at least 1, such as 2'),
    ('size', True, 'size=True must be an integer, at least 1, such as 1'),
    ('size', '7', "size='7' must be an integer, at least 1, such as 7"),
    ('size', 'a', "size='a' must be an integer, at least 1"),
    ('size', None, 'size=None must be an integer, at least 1'),
    ('size', np.float32(3), 'size=3.0 must be an integer, at least 1, such as'),
    ('size', 10**29, 'must be at most 2147483647'),
    ('size', [1], r'size=[1] must be an integer, at least 1'),
    ('maybe', 'x', "maybe='x' must be an integer, at least 0, or None"),
    ('several', (1, 0), 'several[1]=0 must be at least 1'),
    ('several', 'x', 'an integer, at least 1, or a tuple, each an integer'),
    ('share', 1, 'share=1 must be in [0, 1)'),
    # One in float32.
    ('share', 0.99999999, 'share=0.99999999 must be in [0, 1)'),
    ('share', math.nan, 'share=nan must be a finite number, in [0, 1)'),
    ('share', 'nan', "share='nan' must be a number, in [0, 1)"),
    ('rate', 0, 'rate=0 must be above 0'),
    ('rate', math.inf, 'rate=inf must be a finite number, above 0'),
    ('rate', 1e-50, 'rate=1e-50 is 0 in float32: the smallest is 1.175e-38'),
    ('rate', 10**400, 'must be at most 3.402823466e+38'),
    ('seed', 10**29, 'must be at most 4294967295'),
    ('depth', 2, 'depth=2 must be in [-1, 1]'),
    ('name', 'palas', "unknown tried.name='palas'; did you mean pallas? known"),
    ('name', 'cuda', "unknown tried.name='cuda': no kernel"),
    ('name', ['xla'], "name=['xla'] must be one of xla, pallas"),
    ('flag', 1, 'flag=1 must be True or False'),
    (
      'names',
      'full',
      "names='full' must be a tuple, each a text, such as (",
    ),
    ('names', (1,), 'names[0]=1 must be a text'),
    ('names', 'x\n' * 99, 'must be a tuple'),
  ],
)
def test_wrong_value_is_refused_in_one_line(field, value, message):
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    Tried(**{field: value})
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 200


def test_numbers_become_those_of_python():
  tried = Tried(size=np.int64(3), rate=2, share=np.float32(0.5), several=[1, 2])
  assert (type(tried.size), type(tried.rate)) == (int, float)
  assert (tried.share, tried.several) == (0.5, (1, 2))
  assert hash(tried) == hash(Tried(size=3, rate=2.0, share=0.5, several=(1, 2)))
