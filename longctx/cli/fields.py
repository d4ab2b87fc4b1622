"""Config dataclasses read from their source: names, defaults and docstrings.

So that --help needs no import of JAX.
"""

import ast
import dataclasses
import functools
import pathlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a config.

  Attributes:
    name: of the field.
    kind: its annotation.
    default: its value in Python, '' where that is no literal.
    doc: its line among the class's Attributes; of a group, the class's first.
    group: the fields of a dataclass that it holds.
  """

  name: str
  kind: str
  default: str
  doc: str
  group: tuple['Field', ...] = ()


def read(module: str, name: str) -> tuple[Field, ...]:
  """The fields of a dataclass by its name in a module, inherited ones first."""
  found = _find(module, name)
  if found is None:
    raise ValueError(f'{module} has no class {name}')
  module, cls = found
  docs = _attributes(ast.get_docstring(cls) or '')
  fields = []
  for base in map(ast.unparse, cls.bases):
    if _find(module, base) is not None:
      fields += read(module, base)
  for node in cls.body:
    if not isinstance(node, ast.AnnAssign):
      continue
    kind, default, group = ast.unparse(node.annotation), '', ()
    if kind.startswith('ClassVar'):
      continue
    doc = docs.get(node.target.id, '')
    if isinstance(node.value, ast.Constant | ast.Tuple):
      default = ast.unparse(node.value)
    nested = _find(module, kind)
    if nested is not None:
      group = read(nested[0], kind)
      doc = (ast.get_docstring(nested[1]) or '').partition('\n')[0]
    fields.append(Field(node.target.id, kind, default, doc, group))
  return tuple(fields)


@functools.cache
def _parse(module: str) -> ast.Module:
  return ast.parse(source(module))


def source(module: str) -> str:
  """The text of a module of this package, which is not imported."""
  parent, _, name = module.rpartition('.')
  folder = pathlib.Path(__file__).parents[2] / parent.replace('.', '/')
  path = folder / name / '__init__.py'
  return (path if path.exists() else folder / f'{name}.py').read_text()


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
  """The class of that name in a module, and the module that defines it."""
  for node in _parse(module).body:
    if isinstance(node, ast.ClassDef) and node.name == name:
      return module, node
    if isinstance(node, ast.ImportFrom) and node.module.startswith('longctx'):
      for alias in node.names:
        if (alias.asname or alias.name) == name:
          return _find(node.module, alias.name)
  return None


def _attributes(docstring: str) -> dict[str, str]:
  """name -> text of a docstring's Attributes."""
  section = docstring.partition('Attributes:\n')[2].partition('\n\n')[0]
  entries = re.split(r'^  (\w+): ', section, flags=re.MULTILINE)[1:]
  return {
    name: ' '.join(text.split())
    for name, text in zip(entries[::2], entries[1::2], strict=True)
  }


def table(
  fields: tuple[Field, ...],
  values: Mapping[str, Any] | None = None,
  *,
  indent: str = '  ',
) -> Iterator[str]:
  """Lines with every field, its value and what it is; groups are indented.

  Args:
    fields: from `read`.
    values: nested, in place of the defaults.
    indent: of the first column.
  """
  values = values or {}
  for field in fields:
    value = values.get(field.name)
    mapping = value if isinstance(value, Mapping) else {}
    left = indent + field.name
    if field.name in values and not mapping:
      left += f'={value!r}'
    elif not field.group and not mapping and field.default:
      left += f'={field.default}'
    text = textwrap.fill(
      field.doc, 80, initial_indent=' ' * 28, subsequent_indent=' ' * 28
    )
    if len(left) < 27:
      yield left + text[len(left) :]
    else:
      yield from (left, text)
    if field.group:
      yield from table(field.group, mapping, indent=indent + '  ')
    else:
      yield from (f'{indent}  {key}={x!r}' for key, x in mapping.items())
