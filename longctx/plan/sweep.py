"""Sweep over schemes, layouts, remat policies and meshes of a machine."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from longctx.models.config import REMAT_POLICIES
from longctx.parallel import SCHEMES
from longctx.parallel.layout import LAYOUTS
from longctx.plan.report import gib
from longctx.plan.topologies import meshes
from longctx.training.config import ExperimentConfig

# How many programs are compiled: a pod's takes minutes.
MOST = 12


@dataclasses.dataclass(frozen=True)
class Choice:
  """Choice of scheme, layout, remat policy and mesh.

  Attributes:
    mesh: (data, seq, model).
  """

  scheme: str
  layout: str
  remat: str
  mesh: tuple[int, int, int]

  def __str__(self) -> str:
    mesh = 'x'.join(map(str, self.mesh))
    return f'{self.scheme:<12} {self.layout:<10} {self.remat:<13} {mesh:<10}'


@dataclasses.dataclass(frozen=True)
class Entry:
  """Result of a choice in a sweep.

  Attributes:
    choice: what was tried.
    fits: whether the program fits into memory.
    seconds: of a step, by formula.
    bytes: of a device's memory.
    refusal: why it cannot be; '' where it can.
  """

  choice: Choice
  fits: bool = False
  seconds: float = 0.0
  bytes: int = 0
  refusal: str = ''


def choices(config: ExperimentConfig, devices: int) -> list[Choice]:
  """What to try on a number of devices, the config's own kind first.

  Choices that differ from the config in fewer ways come before the others, so
  that a bound leaves the nearest.
  """
  model = config.model
  heads = model.num_kv_heads or model.num_heads
  parallel = config.parallel
  own = parallel.scheme, parallel.layout, model.remat
  rows = config.batch_size // config.optimizer.accumulation
  found = []
  for scheme in SCHEMES:
    # There `model` splits the sequence, and query heads inside.
    most = model.num_heads if scheme == 'ring+ulysses' else heads
    shapes = [
      mesh
      for mesh in meshes(devices, batch=rows, heads=most)
      if scheme != 'ring+ulysses' or mesh[2] > 1
    ]
    found += [
      Choice(scheme, layout, remat, mesh)
      for layout, remat, mesh in itertools.product(
        LAYOUTS, REMAT_POLICIES, shapes
      )
    ]
  shape = parallel.data, parallel.seq, parallel.model

  def distance(choice: Choice) -> tuple[int, int]:
    kinds = zip((choice.scheme, choice.layout, choice.remat), own, strict=True)
    different = sum(a != b for a, b in kinds) + (choice.mesh != shape)
    return different, abs(choice.mesh[0] - rows) + choice.mesh[2]

  return sorted(found, key=distance)


def with_choice(config: ExperimentConfig, choice: Choice) -> ExperimentConfig:
  """The config with what a choice varies."""
  data, seq, model = choice.mesh
  return dataclasses.replace(
    config,
    parallel=dataclasses.replace(
      config.parallel,
      scheme=choice.scheme,
      layout=choice.layout,
      data=data,
      seq=seq,
      model=model,
    ),
    model=dataclasses.replace(config.model, remat=choice.remat),
  )


def sweep(
  config: ExperimentConfig,
  devices: int,
  plan: Callable[[ExperimentConfig], Any],
  *,
  most: int = MOST,
  say: Callable[[str], None] = print,
) -> tuple[list[Entry], int]:
  """Plans what can be, until `most` programs were compiled.

  Args:
    config: that others are near to.
    devices: of the machine.
    plan: makes a `Plan`; what it refuses with ValueError or NotImplementedError
      costs nothing.
    most: programs to compile.
    say: is told of every choice that was compiled.

  Returns:
    The entries, best first, and how many choices were left out.
  """
  entries: list[Entry] = []
  compiled = 0
  # Of remat policies none is refused where another is not.
  reasons: dict[Choice, str] = {}
  waiting = choices(config, devices)
  for index, choice in enumerate(waiting):
    if compiled == most:
      return ranked(entries), len(waiting) - index
    kind = dataclasses.replace(choice, remat='')
    if kind in reasons:
      entries.append(Entry(choice, refusal=reasons[kind]))
      continue
    try:
      found = plan(with_choice(config, choice))
    except (ValueError, NotImplementedError) as error:
      reasons[kind] = ' '.join(str(error).split())
      entries.append(Entry(choice, refusal=reasons[kind]))
      continue
    compiled += 1
    entries.append(
      Entry(choice, found.fits, found.estimate.step, found.memory.total)
    )
    say(f'{compiled}/{most} {line(entries[-1])}')
  return ranked(entries), 0


def ranked(entries: Sequence[Entry]) -> list[Entry]:
  """Those that fit first, then by time, then by memory; refusals last."""
  return sorted(
    entries,
    key=lambda e: (bool(e.refusal), not e.fits, e.seconds, e.bytes),
  )


def line(entry: Entry) -> str:
  """An entry as a line of a table."""
  if entry.refusal:
    return f'{entry.choice} refused: {entry.refusal}'
  fits = 'fits' if entry.fits else 'too large'
  return (
    f'{entry.choice} {fits:<9} {entry.seconds:8.3g} s {gib(entry.bytes):>12}'
  )


def table(entries: Sequence[Entry], left_out: int) -> Iterator[str]:
  """The ranking; of refusals of one reason, the first and their number."""
  yield (
    f'{"scheme":<12} {"layout":<10} {"remat":<13} {"mesh":<10} {"memory":<9} '
    f'{"a step":>10} {"per device":>12}'
  )
  refused: dict[str, list[Entry]] = {}
  for entry in entries:
    if entry.refusal:
      refused.setdefault(entry.refusal, []).append(entry)
    else:
      yield line(entry)
  for reason, members in refused.items():
    yield f'{len(members)} refused: {reason}'
  if left_out:
    yield f'{left_out} left out: --most compiles more'
