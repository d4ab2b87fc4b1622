"""Sampling from a language model: a prompt in chunks, then token by token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from longctx.decoding import cache as cache_lib
from longctx.decoding.decoder import make_decoder
from longctx.models.transformer import Transformer
from longctx.parallel.axes import make_axes
from longctx.parallel.parameters import state_shardings
from longctx.typing import Array, Bool, Float, Int, Key

# Logits that are divided by less may overflow.
COLDEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Sampling parameters: temperature, top-k and top-p.

  The filters apply one after the other, in the order given here.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token, and what is
      above it is at least COLDEST.
    top_k: draw among the k likeliest; 0: among all.
    top_p: draw among the likeliest that together have at least this
      probability (nucleus sampling, arXiv:1904.09751); 1: among all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature and not COLDEST <= self.temperature < np.inf:
      raise ValueError(
        f'temperature={self.temperature} must be 0, for the likeliest token, '
        f'or a number from {COLDEST} on'
      )
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k} must not be negative')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must be in (0, 1]')


GREEDY = Sampling(temperature=0.0)


def sample(
  logits: Float[Array, 'B V'], sampling: Sampling, key: Key[Array, '']
) -> Int[Array, ' B']:
  """Draws a token per row; equal logits count as equally likely."""
  if not sampling.temperature:
    return logits.argmax(-1)
  logits = logits.astype(jnp.float32) / sampling.temperature
  V = logits.shape[-1]
  if 0 < sampling.top_k < V:
    least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    p = jax.nn.softmax(ordered)
    # A token stays if those before it have not reached top_p yet.
    kept = (jnp.cumsum(p, -1) - p < sampling.top_p).sum(-1, keepdims=True)
    least = jnp.take_along_axis(ordered, kept - 1, -1)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """Generation state: rows that are being written.

  Attributes:
    cache: of what was read, as the model's `Decoder` has it.
    logits: of each row's next token.
    ended: rows that have drawn a stop token.
    count: tokens drawn so far.
  """

  cache: Any
  logits: Float[Array, 'B V']
  ended: Bool[Array, ' B']
  count: Int[Array, '']


class Prompts(NamedTuple):
  """Prompts of several lengths, each at the beginning of its row."""

  tokens: Int[np.ndarray, 'B T']
  lengths: Int[np.ndarray, ' B']

  @classmethod
  def of(cls, prompts: list[list[int]] | list[np.ndarray]) -> Prompts:
    """Raises ValueError where a prompt is empty, or there is none."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or not lengths.all():
      raise ValueError(
        f'prompts have {lengths.tolist()} tokens: each needs one, such as BOS'
      )
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    return cls(tokens, lengths)


class Generator:
  """Generator of text: reads prompts, and goes on from them by sampling.

  One compiled program reads `chunk` tokens of every row, one ends the prompts,
  and one draws `steps` tokens. They write into the memory of the cache that
  they are given, which is gone then. The prompt of a model with a gate ends
  with the question.
  """

  def __init__(
    self,
    model: Transformer,
    *,
    capacity: int | None = None,
    chunk: int = 1024,
    sampling: Sampling = GREEDY,
    stop_tokens: tuple[int, ...] = (),
    step: int | None = None,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = 'seq',
    max_new: int | None = None,
    num_tokens: int | None = None,
  ):
    """Makes a generator.

    Args:
      model: trained.
      capacity: the most tokens of a row, its prompt included; None for any
        number, which takes layers that forget or keep a state.
      chunk: the most tokens of a prompt that are read at once; short prompts
        are filled up to a power of two.
      sampling: how tokens are drawn.
      stop_tokens: tokens that end a row.
      step: of the training that made the parameters; None: none.
      mesh: that the cache is spread over, as in `cache.init`.
      axis: as in `cache.init`.
      max_new: the most tokens that are drawn, which a gated model makes room
        for; None: any number up to the capacity.
      num_tokens: tokens that the task has, the first ones of the vocabulary,
        whose rest is never drawn; None: all.
    """
    if chunk < 1:
      raise ValueError(f'{chunk=} must be at least 1')
    if num_tokens is not None and not (
      1 <= num_tokens <= model.config.vocab_size
    ):
      raise ValueError(
        f'{num_tokens=} must be from 1 to vocab_size={model.config.vocab_size}'
      )
    decoder = make_decoder(
      model, capacity=capacity, max_new=max_new, mesh=mesh, axis=axis
    )
    self.capacity = capacity
    self.max_new = decoder.max_new
    self.chunk = chunk
    self._config = model.config
    graph, params = nnx.split(model)
    self._make_cache = functools.partial(decoder.init, model)
    axes = None if mesh is None else make_axes(mesh, axis)
    if axes is not None:
      heads = axes.size(axes.heads)
      params = jax.device_put(
        params, state_shardings(params, mesh, data=1, model=heads)
      )
    self._params = params
    self._place = cache_lib.of_rows(axes)

    def stay(stream):
      if axes is None:
        return stream
      logits, ended = lax.with_sharding_constraint(
        (stream.logits, stream.ended), self._place
      )
      return dataclasses.replace(stream, logits=logits, ended=ended)

    @functools.partial(jax.jit, donate_argnames='stream')
    def prefill(params, stream, tokens, valid):
      logits, cache = decoder.prefill(
        nnx.merge(graph, params),
        stream.cache,
        tokens,
        stream.logits,
        valid=valid,
        step=step,
      )
      return stay(dataclasses.replace(stream, cache=cache, logits=logits))

    @functools.partial(jax.jit, donate_argnames='stream')
    def begin(params, stream):
      model = nnx.merge(graph, params)
      logits, cache = decoder.begin(
        model, stream.cache, stream.logits, step=step
      )
      return stay(dataclasses.replace(stream, cache=cache, logits=logits))

    @functools.partial(
      jax.jit, donate_argnames='stream', static_argnames='steps'
    )
    def draw(params, stream, key, *, steps):
      model = nnx.merge(graph, params)

      def one(stream, _):
        drawn = sample(
          stream.logits[:, :num_tokens],
          sampling,
          jax.random.fold_in(key, stream.count),
        )
        tokens = jnp.where(stream.ended, -1, drawn)
        ended = stream.ended | jnp.isin(drawn, jnp.array(stop_tokens, int))
        logits, cache = decoder.extend(
          model,
          stream.cache,
          drawn[:, None],
          valid=~stream.ended[:, None],
          step=step,
        )
        stream = Stream(
          cache=cache,
          logits=logits[:, 0],
          ended=ended,
          count=stream.count + 1,
        )
        return stream, tokens

      stream, tokens = lax.scan(one, stream, length=steps)
      return stay(stream), tokens.T

    self._prefill, self._begin, self._draw = prefill, begin, draw

  def start(self, prompts: Prompts) -> Stream:
    """Reads prompts, a chunk of all rows at a time.

    Raises:
      ValueError: a prompt is longer than the capacity.
    """
    tokens, lengths = prompts
    self._check(int(lengths.max()), 'the longest prompt')
    B, T = tokens.shape
    stream = Stream(
      cache=self._make_cache(B),
      logits=jnp.zeros((B, self._config.vocab_size), device=self._place),
      ended=jnp.zeros(B, bool, device=self._place),
      count=jnp.int32(0),
    )
    size = min(self.chunk, 1 << (T - 1).bit_length())
    tokens = np.pad(tokens, [(0, 0), (0, -T % size)])
    for begin in range(0, T, size):
      part = slice(begin, begin + size)
      valid = np.arange(begin, begin + size) < lengths[:, None]
      stream = self._prefill(self._params, stream, tokens[:, part], valid)
    return self._begin(self._params, stream)

  def draw(
    self, stream: Stream, key: Key[Array, ''], steps: int
  ) -> tuple[Stream, Int[Array, 'B steps']]:
    """Goes on by `steps` tokens; rows that have ended give -1.

    A token depends on the key and on how many were drawn before it, so that
    any number at a time gives the same ones.

    Raises:
      ValueError: a row would be longer than the capacity.
    """
    if self.capacity is not None:
      longest = int(stream.cache.lengths.max()) + steps
      self._check(longest, 'a row')
    if self.max_new is not None and int(stream.count) + steps > self.max_new:
      raise ValueError(
        f'{int(stream.count) + steps} tokens are more than the max_new='
        f'{self.max_new} that there is room for: raise it'
      )
    return self._draw(self._params, stream, key, steps=steps)

  def generate(
    self,
    prompts: Prompts,
    key: Key[Array, ''],
    *,
    max_new: int,
    at_once: int = 32,
  ) -> Iterator[Int[np.ndarray, 'B _']]:
    """Yields `at_once` tokens per row at a time until all rows have ended."""
    stream, left = self.start(prompts), max_new
    while left > 0 and not stream.ended.all():
      steps = min(at_once, left)
      stream, tokens = self.draw(stream, key, steps)
      left -= steps
      yield np.asarray(tokens)

  def _check(self, length: int, what: str):
    if self.capacity is not None and length > self.capacity:
      raise ValueError(
        f'{what} has {length} tokens, and capacity={self.capacity}: raise it, '
        'or take layers with a window or a recurrence and no capacity'
      )
