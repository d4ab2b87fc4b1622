"""Checkpoints that are verified when read.

Orbax restores flipped bytes without an error and casts a wrong dtype in
silence, so every checkpoint carries the shape, dtype and digest of each leaf,
and a checksum over those and the data position. A checkpoint that fails is set
aside and an older one is used; one of another model is refused.

A checkpoint is four items: `params` and `opt` (flat dicts of arrays, by path),
`data` (the iterator's state) and `meta`, both JSON. `params` alone is enough to
evaluate.
"""

import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from longctx.training.digests import digest, flatten
from longctx.training.errors import CheckpointError, WriteError

ITEMS = ('params', 'opt', 'data', 'meta')


class DamagedError(CheckpointError):
  """Checkpoint damage: it cannot be read back as it was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """Checkpoint that was read back and verified.

  Attributes:
    step: updates made when it was written.
    params: the tree given as template, with arrays.
    opt: the optimizer state likewise; None when only params were asked for.
    data: the data iterator's state.
    meta: what the caller stored beside it.
    digest: of the parameters, which tells them from others.
  """

  step: int
  params: Any
  opt: Any
  data: Any
  meta: Any
  digest: str


def _checksum(*values: Any) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _check_same_model(
  name: str, stored: Mapping[str, list], wanted: Mapping[str, Any]
):
  """Refuses a checkpoint whose leaves have other names, shapes or dtypes."""
  for path in [*wanted, *(p for p in stored if p not in wanted)]:
    have = stored.get(path)
    want = wanted.get(path)
    have = 'nothing' if have is None else f'{have[1]}{have[0]}'
    want = 'nothing' if want is None else f'{want.dtype}{list(want.shape)}'
    if have != want:
      raise CheckpointError(
        f'the checkpoint is of another model: {name} {path} is {have} there '
        f'and {want} in this config; give another --workdir, or the config '
        'that it was written with'
      )


class Checkpointer:
  """Checkpointer, which writes and reads one folder of checkpoints."""

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep: int = 2,
    say: Callable[[str], None] = print,
  ):
    """Opens `directory`, and makes it if need be.

    Args:
      directory: where the numbered checkpoints lie.
      keep: how many of the newest stay.
      say: told, in one line each, about damaged checkpoints.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._say = say
    self._failed = False
    _quiet_errors()
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_handlers={
        'params': ocp.StandardCheckpointHandler(),
        'opt': ocp.StandardCheckpointHandler(),
        'data': ocp.JsonCheckpointHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )

  def steps(self) -> list[int]:
    """Steps that have a finished checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def written(self) -> list[int]:
    """Likewise, once those being written have been, or have failed."""
    # Of several processes the others may be elsewhere, and not wait too.
    if jax.process_count() == 1:
      with contextlib.suppress(WriteError):
        self.wait()
    names = (path.name for path in self.directory.iterdir())
    return sorted(int(name) for name in names if name.isdigit())

  def save(self, step: int, *, params: Any, opt: Any, data: Any, meta: Any):
    """Writes a checkpoint in the background.

    Args:
      step: updates made so far; later than any step already there.
      data: JSON-able state of the data iterator.
      meta: JSON-able, whatever else the caller wants back.

    Raises:
      FloatingPointError: a leaf is not finite; nothing is written.
      CheckpointError: Orbax did not take it.
      WriteError: the disk did not take it, or the one before it.
    """
    leaves = {}
    for name, tree in (('params', params), ('opt', opt)):
      leaves[name], bad = digest(tree)
      if bad:
        raise FloatingPointError(f'{name} {bad[0]} is not finite')
    record = {'step': step, 'leaves': leaves, 'user': meta}
    record['checksum'] = _checksum(step, leaves, meta, data)
    with self._writing():
      taken = self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(flatten(params)),
          opt=ocp.args.StandardSave(flatten(opt)),
          data=ocp.args.JsonSave(data),
          meta=ocp.args.JsonSave(record),
        ),
      )
    # Orbax says no by a return value, for a step that is not the newest.
    if not taken:
      raise CheckpointError(
        f'checkpoint {step} was not written to {self.directory}: it holds '
        f'steps {self.steps()}'
      )

  def restore(
    self, *, params: Any, opt: Any = None, step: int | None = None
  ) -> Restored | None:
    """Reads the newest checkpoint that is whole, or one that is asked for.

    Args:
      params: tree of ShapeDtypeStruct, with shardings where it matters.
      opt: the same for the optimizer; None leaves it unread.
      step: of the checkpoint; None: the newest.

    Returns:
      The checkpoint, or None if there is none at all.

    Raises:
      CheckpointError: it is of another model, or all are damaged, or there is
        none of that step.
    """
    steps = self.steps()
    if step is not None:
      if step not in steps:
        raise CheckpointError(
          f'there is no checkpoint {step} in {self.directory}: it holds '
          f'steps {steps}'
        )
      steps = [step]
    for step in reversed(steps):
      try:
        restored = self._read(step, {'params': params, 'opt': opt})
      except DamagedError as error:
        self._say(
          f'checkpoint {step} is damaged ({error}); trying an older one'
        )
        continue
      if step != steps[-1]:
        self._say(f'using checkpoint {step}')
      return restored
    if steps:
      raise CheckpointError(
        f'every checkpoint in {self.directory} is damaged: {steps}'
      )
    return None

  def newest(self) -> tuple[int, Any] | None:
    """The step of the newest record that can be read, and what it stored."""
    for step in reversed(self.steps()):
      with contextlib.suppress(DamagedError):
        return step, self._read_record(step)[0]['user']
    return None

  def check(self, *, params: Any):
    """Refuses, cheaply, a folder whose checkpoints are of another model."""
    if found := self.newest():
      record, _ = self._read_record(found[0])
      _check_same_model('params', record['leaves']['params'], flatten(params))

  def set_aside_after(self, step: int):
    """Moves checkpoints newer than `step` away, to make room for new ones."""
    for newer in self.steps():
      if newer > step:
        target = self.directory.with_name('damaged_checkpoints') / str(newer)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(self.directory / str(newer), target)
        self._say(f'moved checkpoint {newer} to {target}')
    self._manager.reload()

  def remove_unfinished(self):
    """Deletes what a killed run had not finished writing."""
    for path in self.directory.glob('*.orbax-checkpoint-tmp*'):
      shutil.rmtree(path, ignore_errors=True)

  def _read_record(self, step: int) -> tuple[dict, Any]:
    """The verified `meta` and `data` items."""
    args = {name: ocp.args.JsonRestore() for name in ('data', 'meta')}
    items = _attempt(
      lambda: self._manager.restore(step, args=ocp.args.Composite(**args))
    )
    record, data = items['meta'], items['data']
    try:
      expected = _checksum(
        record['step'], record['leaves'], record['user'], data
      )
      if record['checksum'] != expected or record['step'] != step:
        raise DamagedError('its checksum does not match')
    except (KeyError, TypeError) as error:
      raise DamagedError('its record is incomplete') from error
    return record, data

  def _read(self, step: int, templates: dict[str, Any]) -> Restored:
    record, data = self._read_record(step)
    templates = {k: v for k, v in templates.items() if v is not None}
    args = {}
    for name, template in templates.items():
      flat = flatten(template)
      _check_same_model(name, record['leaves'][name], flat)
      args[name] = ocp.args.StandardRestore(flat)
    items = _attempt(
      lambda: self._manager.restore(step, args=ocp.args.Composite(**args))
    )
    trees = {'opt': None}
    for name, template in templates.items():
      found, _ = digest(items[name])
      for path, description in record['leaves'][name].items():
        if found[path] != description:
          raise DamagedError(f'{name} {path} differs from what was written')
      structure = jax.tree.structure(template)
      leaves = [items[name][path] for path in flatten(template)]
      trees[name] = jax.tree.unflatten(structure, leaves)
    return Restored(
      step=step,
      data=data,
      meta=record['user'],
      digest=_checksum(record['leaves']['params'])[:16],
      **trees,
    )

  def wait(self):
    """Returns once everything saved is on disk.

    Raises:
      WriteError: the disk did not take it.
    """
    with self._writing():
      self._manager.wait_until_finished()

  def close(self):
    """Waits likewise, and lets go of the folder."""
    try:
      with self._writing():
        self._manager.close()
    finally:
      if self._failed:
        # What is half written takes room.
        self.remove_unfinished()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Names the folder in the error of a disk that takes no more."""
    try:
      yield
    except Exception as error:
      reason = _disk_error(error)
      if reason is None:
        raise
      self._failed = True
      _let_abandoned_end()
      raise WriteError(
        f'{self.directory} takes no checkpoint: {reason}'
      ) from error


@functools.cache
def _quiet_errors():
  """Leaves errors of Orbax and TensorStore, which are raised too, to us.

  Otherwise one logs them, asyncio logs each write that nobody waits for any
  more, and callbacks, which meet a closed event loop after an error, print a
  traceback each.
  """
  logging.getLogger('absl').addFilter(
    lambda record: not (record.exc_info and 'orbax' in record.pathname)
  )
  logging.getLogger('asyncio').addFilter(
    lambda record: 'never retrieved' not in record.getMessage()
  )
  warnings.filterwarnings(
    'ignore', r"coroutine 'async_serialize.* was never awaited", RuntimeWarning
  )
  before = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

  sys.unraisablehook = hook


def _disk_error(error: BaseException | None) -> str | None:
  """What the disk said, through all that Orbax and TensorStore wrap it in."""
  while error is not None:
    if isinstance(error, OSError) and error.errno:
      return os.strerror(error.errno)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
      if os.strerror(code) in str(error):
        return os.strerror(code)
    error = error.__cause__ or error.__context__
  return None


def _attempt(read: Callable[[], Any]) -> Any:
  """Damage reaches us as many classes of exception; make it one."""
  try:
    return read()
  except Exception as error:
    reason = str(error).strip() or type(error).__name__
  _let_abandoned_end()
  raise DamagedError(reason.splitlines()[0][:80])


def _let_abandoned_end():
  """Ends, in silence, what Orbax left behind at an error.

  Its other reads or writes have coroutines and callbacks that would put
  tracebacks on stderr when they die.
  """
  hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
  try:
    time.sleep(0.1)
    gc.collect()
  finally:
    sys.unraisablehook = hook


def abstract(tree: Any) -> Any:
  """The tree with a ShapeDtypeStruct for each array, its sharding kept.

  What has none is of the first device.
  """
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def describe(x):
    sharding = getattr(x, 'sharding', None) or one
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

  return jax.tree.map(describe, tree)
