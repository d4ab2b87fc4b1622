"""Types of arrays and of config fields: shape letters, and ranges of numbers.

Every annotation and every einsum uses the same capitals:

  B batch            T query length      S key length
  N query heads      K key/value heads   G = N / K, query heads per key head
  H head dim (q, k)  V value head dim    D model dim      F MLP dim
  C chunk length     P feature-map dim   W kernel width   R ring shards
  Q places of T that are read

Vocabulary size is also written V where no value dim is near. Attention
arrays are BTNH (queries) and BSKH (keys and values).

The shapes are checked under pytest by jaxtyping's import hook and never at run
time. Fields of configs, and the arguments of a layer, are checked whenever one
is made (`Checked`, `check_arguments`): each says its type and its range in its
annotation, as in `window: Positive`, `share: Annotated[float, Between(0, 1)]`
or `filler: Literal['random', 'repeat']`.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, Shaped

__all__ = [
  'Array',
  'Between',
  'Bool',
  'Checked',
  'Float',
  'Fraction',
  'Int',
  'Key',
  'Natural',
  'NonNegative',
  'Num',
  'Positive',
  'PositiveNumber',
  'Reason',
  'Seed',
  'Shaped',
  'Share',
  'Width',
  'among',
  'check_arguments',
  'check_fields',
  'check_floats',
  'check_multiple',
  'check_some',
  'checked',
  'did_you_mean',
  'field_types',
  'make',
  'parse_call',
  'plain_types',
]

# Positions, sizes and counts are int32 on devices, and numbers float32.
LARGEST = 2**31 - 1
FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class Between:
  """Range of a number, its ends included unless `open` names them.

  Attributes:
    low: the smallest.
    high: the largest; None: all that a device can hold.
    open: 'low', 'high' or 'both', of ends that are left out.
  """

  low: int | float
  high: int | float | None = None
  open: str = ''

  def __contains__(self, x: int | float) -> bool:
    ends = {'low': [self.low], 'high': [self.high]}
    ends['both'] = [self.low, self.high]
    # As a device has it: 0.99999999 is 1 there.
    if self.open and np.float32(x) in ends[self.open]:
      return False
    return self.low <= x and (self.high is None or x <= self.high)

  def __str__(self) -> str:
    left = 'above' if self.open in ('low', 'both') else 'at least'
    if self.high is None:
      return f'{left} {self.low}'
    ends = ('(' if left == 'above' else '[') + f'{self.low}, {self.high:.10g}'
    return f'in {ends}' + (')' if self.open in ('high', 'both') else ']')

  def nearest(self, x: int | float) -> int | float:
    """The number of the closed range that is nearest."""
    return max(self.low, x if self.high is None else min(x, self.high))


class Reason(NamedTuple):
  """Reason why a name is refused that one may expect among those of a field."""

  value: str
  text: str


Natural = Annotated[int, Between(0)]
Positive = Annotated[int, Between(1)]
# Of what is made on the host where a model is traced.
Width = Annotated[int, Between(1, 2**20)]
# What `jax.random.key` tells apart.
Seed = Annotated[int, Between(0, 2**32 - 1)]
NonNegative = Annotated[float, Between(0)]
PositiveNumber = Annotated[float, Between(0, open='low')]
Share = Annotated[float, Between(0, 1)]
# A share that leaves something.
Fraction = Annotated[float, Between(0, 1, open='high')]


@dataclasses.dataclass(frozen=True)
class Checked:
  """Checked config: a frozen dataclass that holds its fields to their types.

  A number of numpy becomes Python's, an integer a float where one is asked
  for, a list a tuple.

  Attributes:
    prefix: of the fields in messages, as in 'eval.'.
  """

  prefix: ClassVar[str] = ''
  # Of jaxtyping, which under pytest would be first, and in words of its own.
  __no_type_check__: ClassVar[bool] = True

  def __post_init__(self):
    check_fields(self, self.prefix)
    self.check()

  def check(self) -> None:
    """Raises ValueError for fields that do not fit together; here never."""


def check_fields(fields: Any, prefix: str = '') -> None:
  """Holds a frozen dataclass to the types and ranges of its annotations."""
  hints = field_types(type(fields))
  for name in (field.name for field in dataclasses.fields(fields)):
    value = checked(getattr(fields, name), hints[name], f'{prefix}{name}')
    object.__setattr__(fields, name, value)


def check_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, its keyword arguments held to their annotations."""

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any):
    hints = field_types(function)
    for key in kwargs.keys() & hints.keys():
      kwargs[key] = checked(kwargs[key], hints[key], key)
    return function(*args, **kwargs)

  return call


def make(cls: Callable[..., Any], name: str, fields: Mapping[str, Any]) -> Any:
  """cls(**fields); ValueError for a field that it lacks, or does not get."""
  parameters = inspect.signature(cls).parameters
  for field in fields:
    if field not in parameters:
      raise ValueError(
        f'{name} has no {field!r}{did_you_mean(field, parameters)}'
      )
  for field, parameter in parameters.items():
    if parameter.default is parameter.empty and field not in fields:
      raise ValueError(f'{name} needs {field}')
  return cls(**fields)


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
  """Splits 'name(key=value, …)' into the name and its arguments, literals.

  Raises:
    ValueError: it is something else.
  """
  arguments = {}
  try:
    node = ast.parse(text.strip(), mode='eval').body
  except SyntaxError as error:
    raise ValueError(error.msg) from error
  if isinstance(node, ast.Call):
    if node.args or any(keyword.arg is None for keyword in node.keywords):
      raise ValueError('arguments go by name')
    arguments = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
    node = node.func
  if not isinstance(node, ast.Name):
    raise ValueError('not a name')
  return node.id, arguments


@functools.cache
def field_types(of: Any) -> dict[str, Any]:
  """Annotations of a dataclass or a function, their ranges included."""
  owners = reversed(of.__mro__) if isinstance(of, type) else [of]
  found = [inspect.get_annotations(owner, eval_str=True) for owner in owners]
  return {name: hint for one in found for name, hint in one.items()}


def checked(value: Any, hint: Any, name: str) -> Any:
  """The value as its annotation has it, numbers converted.

  Raises:
    ValueError: another type, or outside of the range, in one line with the
      nearest right value.
  """
  options = _options(hint)
  if isinstance(value, np.generic):
    value = value.item()
  for option in options:
    kind, bounds, reasons = _parts(option)
    if not _is_a(value, kind):
      continue
    if kind in (int, float):
      return _in_range(value, kind, bounds, name)
    if typing.get_origin(kind) is tuple:
      of = typing.get_args(kind)[0]
      return tuple(checked(x, of, f'{name}[{i}]') for i, x in enumerate(value))
    if typing.get_origin(kind) is Literal and value not in typing.get_args(
      kind
    ):
      known = [str(x) for x in typing.get_args(kind)]
      why = reasons.get(value) or among(value, known)
      raise ValueError(f'unknown {name}={_show(value)}{why}')
    return value
  wanted = ', or '.join(_describe(option) for option in options)
  near = _nearest(value, options)
  raise ValueError(
    f'{name}={_show(value)} must be {wanted}'
    + ('' if near is None else f', such as {_show(near)}')
  )


def plain_types(hint: Any) -> list[Any]:
  """The types that an annotation names, without ranges; str for its names."""
  kinds = [_parts(option)[0] for option in _options(hint)]
  return [str if typing.get_origin(k) is Literal else k for k in kinds]


def _options(hint: Any) -> tuple[Any, ...]:
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def _parts(hint: Any) -> tuple[Any, Between | None, dict[str, str]]:
  """A type without its range, the range, and reasons of refusals."""
  kind, *more = [hint]
  if typing.get_origin(hint) is Annotated:
    kind, *more = typing.get_args(hint)
  bounds = [x for x in more if isinstance(x, Between)]
  reasons = dict(x for x in more if isinstance(x, Reason))
  return kind, bounds[0] if bounds else None, reasons


def _is_a(value: Any, kind: Any) -> bool:
  """Whether a value is of a type; True is no 1, and 1 may stand for 1.0."""
  origin = typing.get_origin(kind) or kind
  if kind is Any:
    return True
  if origin is Literal:
    return type(value) in {type(known) for known in typing.get_args(kind)}
  if origin is tuple:
    return isinstance(value, (tuple, list))
  if origin in (int, float):
    allowed = (int, float) if origin is float else int
    return isinstance(value, allowed) and not isinstance(value, bool)
  return isinstance(value, origin)


def _in_range(
  value: int | float, kind: type, bounds: Between | None, name: str
) -> int | float:
  bounds = bounds or Between(-math.inf)
  most = LARGEST if kind is int else float(FLOAT32.max)
  if not math.inf > abs(value):
    raise ValueError(f'{name}={value} must be a finite number, {bounds}')
  if bounds.high is not None and kind is int:
    most = bounds.high
  if abs(value) > max(most, bounds.high or 0):
    end = (
      f'most {most:.10g}' if value > 0 else f'least {max(-most, bounds.low)}'
    )
    raise ValueError(f'{name}={_show(value)} must be at {end}')
  if kind is float and 0 < abs(value) < float(FLOAT32.tiny):
    raise ValueError(
      f'{name}={value} is 0 in float32: the smallest is {FLOAT32.tiny:.4g}'
    )
  if value not in bounds:
    what = f'at least {bounds.low}' if kind is int else bounds
    raise ValueError(f'{name}={_show(value)} must be {what}')
  return kind(value)


def _describe(hint: Any) -> str:
  kind, bounds, _ = _parts(hint)
  if typing.get_origin(kind) is tuple:
    return f'a tuple, each {_describe(typing.get_args(kind)[0])}'
  if typing.get_origin(kind) is Literal:
    return 'one of ' + ', '.join(map(str, typing.get_args(kind)))
  words = {
    int: 'an integer',
    float: 'a number',
    bool: 'True or False',
    str: 'a text',
    types.NoneType: 'None',
  }
  text = words.get(kind, getattr(kind, '__name__', str(kind)))
  return text if bounds is None else f'{text}, {bounds}'


def _nearest(value: Any, options: tuple[Any, ...]) -> Any:
  """The value of another type that was likely meant, or None."""
  for option in options:
    kind, bounds, _ = _parts(option)
    if kind == tuple[str, ...] and isinstance(value, str):
      return (value,)
    if kind not in (int, float) or not isinstance(value, (str, int, float)):
      continue
    try:
      near = round(float(value)) if kind is int else float(value)
    except (ValueError, OverflowError):
      continue
    if math.isfinite(near):
      return near if bounds is None else kind(bounds.nearest(near))
  return None


def check_floats(**arrays: Any) -> None:
  """Refuses arrays of integers, whose results would be integers too."""
  for name, x in arrays.items():
    if x.dtype.kind in 'biuc':
      raise ValueError(
        f'{name}.dtype={x.dtype} must be of real numbers, such as float32'
      )


def did_you_mean(name: Any, known: Any) -> str:
  """'; did you mean ...?', of the closest of some names, or ''."""
  close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
  return f'; did you mean {close[0]}?' if close else ''


def among(name: Any, known: Any) -> str:
  """'; known: ...', and before it the name that was likely meant."""
  return f'{did_you_mean(name, known) or ";"} known: {", ".join(known)}'


def check_some(fields: Any, name: str) -> None:
  """Refuses a tuple without entries, or with one of them twice."""
  given = getattr(fields, name)
  if not given or len(set(given)) < len(given):
    raise ValueError(f'{name}={given!r} must have entries, each of them once')


def check_multiple(fields: Any, name: str, of: str) -> None:
  """Refuses a field that another, or a property, does not divide.

  Raises:
    ValueError: with the nearest that it divides.
  """
  prefix = getattr(fields, 'prefix', '')
  value, by = (operator.attrgetter(x)(fields) for x in (name, of))
  if value % by:
    below = value - value % by
    near = f'{below} or {below + by}' if below else f'{by}'
    raise ValueError(
      f'{prefix}{name}={value} must be a multiple of {prefix}{of}={by}: {near}'
    )


def _show(value: Any) -> str:
  return ' '.join(reprlib.repr(value).split())
