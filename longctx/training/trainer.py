"""Training loop: the runs of an experiment, each to its own folder.

A run can be killed at any time: the same command continues from the last
checkpoint and ends with the parameters of a run that was never stopped, bit for
bit on the same mesh, data order included.
"""

import contextlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from longctx.analysis.analyzer import Analyzer
from longctx.data.pipeline import BatchIterator
from longctx.training import config as config_lib
from longctx.training import (
  figures,
  metrics,
  phase,
  step_cost,
  steps,
  transfer,
  warm_start,
)
from longctx.training import results as results_lib
from longctx.training.checkpoint import Checkpointer, abstract
from longctx.training.errors import (
  NotFiniteError,
  StoppedError,
  WriteError,
)
from longctx.training.lock import locked
from longctx.training.log_files import write_json
from longctx.training.metrics_log import MetricsLog, read_metrics
from longctx.training.optimizer import make_schedule
from longctx.training.progress import Progress
from longctx.training.runs import Run, open_batches
from longctx.training.signals import StopRequest


def train(runs: list[Run], workdir: pathlib.Path) -> dict[str, Any]:
  """Trains every run, compares them, and returns results.json by run.

  Raises:
    StoppedError: SIGTERM or SIGINT came; what was done is saved.
    NotFiniteError: a loss diverged; the last good checkpoint stays.
    LockedError: another process trains there.
    WriteError: the disk is full; the last good checkpoint stays.
  """
  with locked(workdir), StopRequest() as stop:
    results = {run.name: train_run(run, stop=stop) for run in runs}
    if not metrics.is_writer():
      return results
    if len(runs) > 1:
      write_json(workdir / 'results.json', results, sealed=True)
      models = (run.model for run in runs)
      figures.training(
        workdir / 'figures' / 'training.png',
        {run.name: read_metrics(run.workdir) for run in runs},
        results=results,
        title=figures.describe(runs[0].config.task, models),
      )
  print(results_lib.table(results))
  print(f'figures: {workdir / "figures"}')
  return results


def save_start(run: Run) -> None:
  """Writes checkpoint 0 of a run, which nothing has trained."""
  with locked(run.workdir), contextlib.closing(Trainer(run)) as trainer:
    trainer.save()
  metrics.say(f'{run.workdir} holds step 0 of {run.config.init_from}')


def train_run(run: Run, *, stop: StopRequest) -> dict[str, Any]:
  """Trains one run to its last step and measures it on the test split."""
  with contextlib.ExitStack() as stack:
    trainer = Trainer(run)
    stack.callback(trainer.close)
    try:
      return trainer.run(stop)
    except WriteError as error:
      raise WriteError(f'{error}; {trainer.kept()}') from error


class Trainer:
  """Training state of one run, and the loop that advances it."""

  def __init__(self, run: Run):
    """Restores the run where it was, or makes its initial state."""
    config, self._run = run.config, run
    self.name, self.config, self.task = run.name, config, run.task
    self.workdir = run.workdir
    self.placement = run.placement
    self.graph, params = steps.abstract_params(run.model)
    self.model = nnx.merge(self.graph, params)
    self.compiled: Callable[..., Any] | None = None
    self.shapes: set[tuple] = set()
    self.parameters = sum(x.size for x in jax.tree.leaves(params))
    self.functions = steps.make_steps(
      self.graph,
      config,
      placement=run.placement,
      byte_counts=run.task.byte_counts,
    )
    self.schedule = make_schedule(config.optimizer, config.steps)
    self.meter = metrics.Meter()
    self.seconds = 0.0
    # Dense steps have to come within its patience.
    self.detector = phase.PhaseDetector(
      bend=config.analysis.bend,
      patience=max(phase.PATIENCE, 2 * config.analysis.dense_every),
    )
    self.analyzer: Analyzer | None = None
    if config.analysis.every:
      self.analyzer = Analyzer(
        self.graph,
        run.model,
        run.task,
        rows=config.analysis.rows,
        seed=config.seed,
        placement=run.placement,
      )
    self.state: steps.State = {}
    self.batches = self._open('train')
    self.checkpointer = Checkpointer(
      run.workdir / 'checkpoints', keep=config.checkpoint.keep, say=metrics.say
    )
    # Processes that share a CPU's collectives can lock each other up when steps
    # are queued.
    self.lockstep = jax.process_count() > 1 and jax.default_backend() == 'cpu'
    self.step, logged = self._restore()
    self.teacher, self.transfer = self._teacher(), None
    # The start of a run is no checkpoint yet.
    self.saved = self.step or None
    self.log = MetricsLog(
      run.workdir,
      start_step=self.step,
      tensorboard=config.log.tensorboard,
      saved=logged,
    )
    self.validation: list | None = None

  def _open(self, split: str) -> BatchIterator:
    return open_batches(self.config, self.task, split, placement=self.placement)

  def _restore(self) -> tuple[int, dict[str, int] | None]:
    """Updates made so far, and the state of their log."""
    self.checkpointer.remove_unfinished()
    place = dict(placement=self.placement)
    template = steps.abstract_state(self._run.model, self.config, **place)
    found = self.checkpointer.restore(**abstract(template))
    if found is None:
      begin = warm_start.start if self.config.init_from else steps.init_state
      self.state = begin(self._run.model, self.config, **place)
      return 0, MetricsLog.EMPTY
    self.checkpointer.set_aside_after(found.step)
    self.state = {'params': found.params, 'opt': found.opt}
    self.batches.set_state(found.data)
    self.meter.set_state(found.meta['meter'])
    self.seconds = found.meta['seconds']
    # Checkpoints of earlier versions lack it.
    if 'detector' in found.meta:
      self.detector.set_state(found.meta['detector'])
    return found.step, found.meta.get('log')

  def _teacher(self) -> transfer.Teacher | None:
    """The model that exchanged layers still have to learn of, if any."""
    if self.step >= self.config.transfer.steps:
      return None
    origin = warm_start.open_origin(self.config.init_from)
    layers = transfer.exchanged_layers(origin.config, self._run.model)
    return warm_start.teacher(origin, layers, self.config, self.placement)

  def run(self, stop: StopRequest) -> dict[str, Any]:
    """Trains to the last step; returns what results.json holds."""
    config, first = self.config, self.step
    step_cost.announce_run(self._run, first, self.parameters)
    begun, before = time.perf_counter(), self.seconds
    pending = None
    with Progress(
      self.name or 'train', config.steps, start=first, bar=config.log.progress
    ) as self.progress:
      for step in range(first + 1, config.steps + 1):
        batch = self._put(next(self.batches), training=True)
        values = self._update(batch, step)
        self.step = step
        # Reading a step's metrics waits for it; by now the next one runs.
        if pending is not None:
          self._note(*pending)
        pending = (step, values)
        # Before the metrics of this step, also where they are read at once: a
        # resumed run has to decide likewise.
        due = self._due_after(step)
        if self.lockstep:
          self._note(*pending)
          pending = None
        stop_now = stop.due()
        if due or stop_now:
          if pending is not None:
            self._note(*pending)
          pending = None
          # Only now the step has ended.
          self.seconds = before + time.perf_counter() - begun
          if 'validate' in due:
            with self.progress.doing('evaluating'):
              self._validate()
          if 'analyze' in due:
            self._analyze('analysis', self.analyzer.measure)
          if 'ablate' in due:
            self._analyze('ablation', self.analyzer.ablate)
          # After all that writes a line, so that no resumed run lacks it.
          if 'save' in due or stop_now:
            with self.progress.doing('saving'):
              self.save()
          self.meter.pause()
        if stop_now and step < config.steps:
          self._stop(stop.signum)
      return self._finish(first)

  def _due_after(self, step: int) -> set[str]:
    """What follows a step, from what is known of the steps before it."""
    config, analysis = self.config, self.config.analysis
    always = step == config.steps or (
      self.detector.dense(step) and _due(step, analysis.dense_every)
    )
    due = {
      'validate': always or _due(step, config.eval.every),
      'save': always or _due(step, config.checkpoint.every),
      'analyze': always or _due(step, analysis.every),
      'ablate': step == config.steps or self.detector.settled(step),
    }
    if self.analyzer is None:
      due['analyze'] = due['ablate'] = False
    if not analysis.ablate:
      due['ablate'] = False
    return {name for name, now in due.items() if now}

  def _update(self, batch: steps.Batch, step: int) -> dict[str, jax.Array]:
    """Makes one update, and says so where it has to be compiled first."""
    if step <= self.config.transfer.steps:
      return self._learn_of_teacher(batch, step)
    self.teacher = self.transfer = None
    first = self.compiled is None
    expected = 0.0
    if first:
      expected = step_cost.expect(self._run, self._flops())
    shapes = tuple(x.shape for x in batch.values())
    activity = contextlib.nullcontext()
    if shapes not in self.shapes:
      self.shapes.add(shapes)
      activity = self.progress.doing('compiling', done='compiled in')
    with activity:
      if first:
        self._compile(batch)
      self.state, values = self.compiled(self.state, batch, np.int32(step))
    if first:
      with self.progress.doing('first step', expected):
        jax.block_until_ready(values)
    return values

  def _learn_of_teacher(self, batch, step) -> dict[str, jax.Array]:
    """Makes an update of the exchanged layers alone."""
    activity = contextlib.nullcontext()
    if self.transfer is None:
      self.transfer = transfer.make_step(
        self.graph, self.teacher, self.config, placement=self.placement
      )
      activity = self.progress.doing('compiling', done='compiled in')
    with activity:
      self.state, values = self.transfer(
        self.state, self.teacher.params, batch, np.int32(step)
      )
    return values

  def _flops(self) -> int:
    return 3 * self.model.flops(self.task.seq_len) * self.config.batch_size

  def _compile(self, batch: steps.Batch):
    """Compiles a step; on a mesh, says beforehand what it will cost."""
    if self.placement is None:
      self.compiled = self.functions.train
      return
    train = self.functions.train.lower(self.state, batch, np.int32(0))
    self.compiled = train.compile()
    step_cost.announce_program(self._run, self._flops(), self.compiled)
    # At a million tokens one step is a run.
    self.meter.start()

  def _note(self, step: int, values: Any):
    """Takes in the metrics of a finished step, and stops at a bad one."""
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    for key in ('loss', 'grad_norm'):
      if not np.isfinite(values[key]):
        self._not_finite(f'{key} is {values[key]} at step {step}')
    tokens = self.config.batch_size * self.task.seq_len
    self.meter.add(values, tokens=tokens)
    self.detector.add_accuracy(
      step, values['correct'] / max(values['weight'], 1e-9)
    )
    rates, due = self.meter.rates(), step % self.config.log.every == 0
    self.progress.advance(
      figures=metrics.figures(rates) if due or self.progress.stale() else ''
    )
    if due:
      row = {
        'step': step,
        'split': 'train',
        **rates,
        'learning_rate': float(self.schedule(step - 1)),
        'grad_norm': values['grad_norm'],
      }
      self.log.write(row)
      self.meter.reset()

  def kept(self) -> str:
    """What is safe of the run, whatever happens."""
    written = self.checkpointer.written()
    if not written:
      return 'there is no checkpoint yet'
    return f'checkpoint {written[-1]} is the last good one'

  def _not_finite(self, what: str):
    raise NotFiniteError(
      f'{what}; {self.kept()}. A lower optimizer.learning_rate, more '
      'optimizer.warmup_steps or a smaller optimizer.clip_norm may help'
    )

  def _put(self, batch: steps.Batch, *, training: bool) -> steps.Batch:
    # On a mesh a training step computes every place, as its announced cost
    # says; and another process may score another number of places.
    mesh = self.placement is not None
    if not mesh or (not training and jax.process_count() == 1):
      batch = steps.with_query_indices(batch)
    return steps.put(batch, self.placement)

  def _validate(self):
    if self.validation is None:
      batches = self._open('validation')
      self.validation = list(batches)
      batches.close()
    row = self.measure(self.validation)
    self.detector.add_score(self.step, row['accuracy'])
    self.log.write({'step': self.step, 'split': 'validation', **row})

  def _analyze(self, split: str, measure: Callable[..., dict[str, Any]]):
    begun = time.perf_counter()
    with self.progress.doing(split):
      row = measure(self.state['params'], self.step)
    seconds = time.perf_counter() - begun
    self.log.write(
      {'step': self.step, 'split': split, 'seconds': seconds, **row}
    )

  def measure(self, batches: Iterable[steps.Batch]) -> dict[str, float]:
    """Mean loss and accuracy over batches, each token counted once."""
    return metrics.means(
      self.functions.evaluate(
        self.state['params'],
        self._put(batch, training=False),
        np.int32(self.step),
      )
      for batch in batches
    )

  def save(self):
    """Writes a checkpoint of this step, in the background."""
    if self.saved == self.step:
      return
    try:
      self.checkpointer.save(
        self.step,
        **self.state,
        data=self.batches.get_state(),
        meta={
          'meter': self.meter.state(),
          'seconds': self.seconds,
          'detector': self.detector.state(),
          'log': self.log.state(),
          'config': config_lib.to_dict(self.config),
          'text': self.task.text_digest,
        },
      )
    except FloatingPointError as error:
      self._not_finite(f'{error} after step {self.step}')
    self.saved = self.step

  def _stop(self, signum: int):
    self.checkpointer.wait()
    raise StoppedError(
      f'{signal.Signals(signum).name}: saved step {self.step} of '
      f'{self.config.steps} in {self.workdir}; the same command continues',
      signum,
    )

  def _finish(self, first: int) -> dict[str, Any]:
    """Measures the test split once, and writes results.json."""
    path = self.workdir / 'results.json'
    with self.progress.doing('saving'):
      self.checkpointer.wait()
    finished = first == self.step and results_lib.read_finished(path, first)
    if finished:
      metrics.say(f'{self.name or "train"}: already finished')
      return finished
    rows = self.log.rows()
    batches = self._open('test')
    with self.progress.doing('evaluating'):
      test = self.measure(batches)
    batches.close()
    if not metrics.is_writer():
      return test
    results = results_lib.summary(
      rows,
      test,
      task=self.task,
      steps=self.step,
      step_tokens=self.config.batch_size * self.task.seq_len,
      parameters=self.parameters,
      state_bytes=self.model.state_bytes(self.task.seq_len),
      seconds=self.seconds,
      seed=self.config.seed,
    )
    figures.training(
      self.workdir / 'figures' / 'training.png',
      {self.name: rows},
      results={self.name: results},
      title=figures.describe(self.config.task, [self.model.config]),
    )
    # Last of all, for it says that the run is finished.
    write_json(path, results, sealed=True)
    return results

  def close(self):
    self.batches.close()
    self.log.close()
    self.checkpointer.close()


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
