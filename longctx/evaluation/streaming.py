"""Streaming evaluation: loss on an endless stream under a KV cache policy.

One stream is read in constant memory by the same parameters, full attention
exchanged for what a policy keeps (StreamingLLM, arXiv:2309.17453):

  dense       every token, as trained, as far as `dense_tokens`
  window      the last `slots` tokens
  recompute   likewise, but read anew for each scored token, so that no key
              remembers what has left the window
  sinks       the first `sinks` tokens and the last ones, `slots` in all, whose
              positions are counted within the cache
  sinks_text  likewise, with positions of the text
  trained     the model as it is, whose layers keep windows or states

Per policy, the loss is that of each token given what was kept, in buckets of
positions.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.attention import parse_layer
from longctx.data.token_stream import Piece, TokenStream
from longctx.decoding import cache as cache_lib
from longctx.evaluation import sweep
from longctx.evaluation.stream_log import StreamLog
from longctx.models.transformer import TransformerConfig
from longctx.tasks import SPLITS
from longctx.training import figures, metrics, steps
from longctx.training.runs import Run
from longctx.typing import (
  Checked,
  Natural,
  Positive,
  check_multiple,
  check_some,
)

# What stands in for a layer `full`; None leaves it.
POLICIES = {
  'dense': None,
  'window': 'sliding_window(window={slots})',
  'recompute': None,
  'sinks': 'streaming(num_sinks={sinks}, window={rest}, cache_positions=True)',
  'sinks_text': 'streaming(num_sinks={sinks}, window={rest})',
  'trained': None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig(Checked):
  """Streaming evaluation config: tokens, policies and cache size.

  Attributes:
    tokens: Read this many tokens of the stream.
    policies: Read it once for each of these policies, names in POLICIES.
    slots: Let a layer keep this many keys.
    sinks: Let this many of these be the first tokens.
    rows: Read this many streams side by side, at other places of the text.
    chunk: Read this many tokens at once, which changes no figure.
    bucket: Write a line for this many positions; the first are fewer.
    dense_tokens: End the dense policy here; 0 takes twice the trained length.
    recomputed: Score this many tokens of each bucket under `recompute`.
    split: Take the text of this split.
  """

  tokens: Positive = 65536
  policies: tuple[Literal[tuple(POLICIES)], ...] = ('window', 'sinks')
  slots: Positive = 256
  sinks: Natural = 4
  rows: Positive = 1
  chunk: Positive = 128
  bucket: Positive = 16384
  dense_tokens: Natural = 0
  recomputed: Positive = 16
  split: Literal[SPLITS] = 'test'

  def check(self):
    check_some(self, 'policies')
    if self.sinks >= self.slots:
      raise ValueError(
        f'sinks={self.sinks} must be fewer than slots={self.slots}, which the '
        'window needs too'
      )
    check_multiple(self, 'bucket', 'chunk')

  def edges(self, end: int) -> Iterator[tuple[int, int]]:
    """Buckets up to a position: as large as all before, then of one size."""
    begin = 0
    while begin < end:
      size = min(max(begin, self.chunk), self.bucket)
      yield begin, begin + size
      begin += size


def with_policy(
  model: TransformerConfig, policy: str, config: StreamConfig
) -> TransformerConfig:
  """The model, its full layers exchanged for what a policy keeps.

  Raises:
    ValueError: there is no full layer to exchange.
  """
  layer = POLICIES[policy]
  if layer is None:
    return model
  layer = layer.format(
    slots=config.slots, sinks=config.sinks, rest=config.slots - config.sinks
  )
  name, own = parse_layer(layer)

  def exchange(text: str) -> str:
    kept, arguments = parse_layer(text)
    if kept != 'full':
      return text
    # What a layer has of its own, such as its positions, stays.
    both = {**arguments, **own}
    return f'{name}({", ".join(f"{k}={v!r}" for k, v in both.items())})'

  layers = tuple(map(exchange, model.layers))
  if layers == model.layers:
    raise ValueError(
      f"policy {policy!r} stands in for layers 'full', and the model has "
      f"{', '.join(model.layers)}: take 'trained'"
    )
  return dataclasses.replace(model, layers=layers)


def check(run: Run, config: StreamConfig) -> None:
  """Makes the caches of every policy without computing.

  Raises:
    ValueError: a policy does not fit the model, or would need more and more
      memory.
  """
  if run.model.gate.keep:
    raise NotImplementedError(
      'a gate chooses once from a whole context, and a stream has no end: take '
      'a model without one'
    )
  for policy in config.policies:
    changed = with_policy(run.model, policy, config)
    graph, params = steps.abstract_params(changed)
    model = nnx.merge(graph, params)
    capacity = _end(run, policy, config) if policy == 'dense' else None
    if policy == 'recompute':
      cache_lib.check_positions(model, config.slots)
    else:
      jax.eval_shape(
        lambda model=model, capacity=capacity: (
          cache_lib.init(model, batch_size=1, capacity=capacity).layers
        )
      )


def evaluate_stream(
  run: Run, config: StreamConfig
) -> dict[str, list[dict[str, Any]]]:
  """Reads the stream under every policy.

  Writes stream.jsonl, a line per policy and bucket, and figures/stream.png into
  the run's folder. What was read is kept beside it, so that the same command
  goes on after a stop, or farther with more tokens.

  Args:
    run: from `evaluate.open_workdir`.
    config: how the stream is read.

  Returns:
    The lines of each policy: begin and end of the bucket, loss (nats per scored
    token), accuracy and, of text, bits per byte, the count of tokens, seconds,
    and the bytes that the process has held at most so far.
  """
  learned = sweep.restore(run)
  tokens = TokenStream(
    task=run.task, split=config.split, seed=run.config.seed, rows=config.rows
  )
  found = {}
  for policy in config.policies:
    measure = _recompute if policy == 'recompute' else _read
    found[policy] = measure(run, learned, tokens, policy, config)
    metrics.say(_line(policy, found[policy], config))
  path = run.workdir / 'figures' / 'stream.png'
  figures.stream(
    path,
    {policy: [rows] for policy, rows in found.items()},
    trained_at=run.task.seq_len,
    title=figures.describe(run.config.task, [run.model]),
  )
  metrics.say(f'figure: {path}')
  return found


def _end(run: Run, policy: str, config: StreamConfig) -> int:
  """Where a policy's stream ends, in whole chunks."""
  chunks = -(-config.tokens // config.chunk)
  if policy == 'dense':
    most = config.dense_tokens or 2 * run.task.seq_len
    if run.model.position_encoding == 'learned':
      most = min(most, run.model.max_positions)
    chunks = min(chunks, max(1, most // config.chunk))
  return chunks * config.chunk


def _read(run, learned, tokens, policy, config) -> list[dict[str, Any]]:
  """The lines of a policy that keeps a cache."""
  changed = with_policy(run.model, policy, config)
  graph, _ = steps.abstract_params(changed)
  end = _end(run, policy, config)
  cache = cache_lib.init(
    nnx.merge(graph, learned.params),
    batch_size=config.rows,
    capacity=end if policy == 'dense' else None,
  )
  log = _open_log(run, policy, config, learned)
  cache = log.resume(cache)
  byte_counts = run.task.byte_counts

  @functools.partial(jax.jit, donate_argnames='cache')
  def extend(params, cache, piece):
    model = nnx.merge(graph, params)
    logits, cache = cache_lib.extend(
      model, cache, piece.tokens, step=learned.step
    )
    return cache, _sums(logits, piece, byte_counts)

  with log.progress(end) as bar:
    for begin, stop in config.edges(end):
      # A stream that ended within a bucket goes on from there.
      begin, stop = max(begin, log.position), min(stop, end)
      if begin >= stop:
        continue
      start, sums = time.perf_counter(), []
      for at in range(begin, stop, config.chunk):
        piece = tokens.take(at, config.chunk)
        cache, part = extend(learned.params, cache, piece)
        sums.append(part)
        bar.advance(config.chunk)
      total = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
      seconds = time.perf_counter() - start
      log.write(begin, stop, total, seconds, cache)
  return log.lines


def _recompute(run, learned, tokens, policy, config) -> list[dict[str, Any]]:
  """The lines of windows that are read anew."""
  log = _open_log(run, policy, config, learned)
  log.resume(None)
  graph, byte_counts = learned.graph, run.task.byte_counts

  @jax.jit
  def read(params, piece):
    model = nnx.merge(graph, params)
    x = model.embed(piece.tokens)
    last = jnp.full((x.shape[0], 1), config.slots - 1)
    logits = model.logits(
      model.hidden(x, query_indices=last, step=learned.step)
    )
    ends = Piece(*(y[:, -1:] for y in piece))
    return _sums(logits, ends, byte_counts)

  end = _end(run, policy, config)
  with log.progress(end) as bar:
    for begin, stop in config.edges(end):
      begin, stop = max(begin, log.position), min(stop, end)
      # The first ones have no whole window yet.
      first = max(begin, config.slots - 1)
      if first >= stop:
        continue
      start, sums = time.perf_counter(), []
      count = min(config.recomputed, stop - first)
      for at in np.linspace(first, stop - 1, count).astype(int):
        oldest = int(at) - config.slots + 1
        piece = tokens.take(oldest, config.slots, anew=True)
        sums.append(read(learned.params, piece))
      total = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
      bar.advance(stop - begin)
      log.write(begin, stop, total, time.perf_counter() - start)
  return log.lines


def _open_log(
  run: Run, policy: str, config: StreamConfig, learned: sweep.Parameters
) -> StreamLog:
  """The log of a policy, which goes on where its settings are the same."""
  what = dataclasses.asdict(config)
  del what['tokens'], what['policies']
  if policy == 'dense':
    what['end'] = _end(run, policy, config)
  return StreamLog(
    run.workdir, policy, {**what, **sweep.identity(run, learned)}
  )


def _sums(logits, piece: Piece, byte_counts: np.ndarray | None) -> jax.Array:
  """Nats of scored tokens, their weight, that of right guesses, and bytes."""
  logp = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logp, piece.labels[..., None], -1)[..., 0]
  hit = logits.argmax(-1) == piece.labels
  counts = jnp.zeros(1) if byte_counts is None else jnp.asarray(byte_counts)
  counts = jnp.take(counts, piece.labels, mode='clip')
  scored = jnp.stack([nll, jnp.ones_like(nll), hit, counts]) * piece.weights
  return scored.sum((1, 2))


def _line(policy: str, rows: list[dict[str, Any]], config: StreamConfig) -> str:
  """What came out, in one line."""
  mean = lambda rows: np.average(
    [row['loss'] for row in rows], weights=[row['count'] for row in rows]
  )
  seconds = sum(row['seconds'] for row in rows)
  # Before anything is forgotten, and long after.
  early = [row for row in rows if row['end'] <= config.slots]
  late = [row for row in rows if row['begin'] >= 2 * config.slots]
  parts = [
    f'{name} {mean(part):.4f}'
    for name, part in (
      ('loss', rows),
      (f'to {config.slots:,}', early),
      (f'from {2 * config.slots:,}', late),
      ('last half', late[len(late) // 2 :]),
    )
    if part
  ]
  total = rows[-1]['end'] * config.rows
  return (
    f'{policy}: {", ".join(parts)} nats; {total:,} tokens in {seconds:.0f} s'
  )
