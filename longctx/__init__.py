"""Long-context attention as masks and recurrences, in JAX.

    import longctx as lc
    mask = lc.masks.Causal() & lc.masks.SlidingWindow(127)
    out = lc.dot_product_attention(q, k, v, mask=mask)
    layer = lc.Attention('gla', d_model=64, num_heads=4, rngs=nnx.Rngs(0))

Names are imported when they are first used, so that this costs no import of
JAX. There are:
"""

import glob
import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'

# Name -> where it is, and what it is for.
_FACE = {
  'dot_product_attention': (
    'longctx.ops.dot_product_attention.dot_product_attention',
    'exact attention under a mask, without a T x S array',
  ),
  'linear_attention': (
    'longctx.ops.recurrence.linear_attention',
    'linear attention, RetNet, GLA and Mamba-2',
  ),
  'gated_delta_rule': (
    'longctx.ops.recurrence.gated_delta_rule',
    'DeltaNet and Gated DeltaNet',
  ),
  'masks': ('longctx.masks', 'attention masks, which combine with & and |'),
  'parallel': ('longctx.parallel', 'the same ops on a mesh, and make_mesh'),
  'Attention': (
    'longctx.attention.make_layer',
    'any attention variant as a layer, by its name',
  ),
  'AttentionConfig': (
    'longctx.attention.AttentionConfig',
    'what the attention layers of a model share',
  ),
  'VARIANTS': ('longctx.attention.VARIANTS', 'the attention variants by name'),
  'Transformer': (
    'longctx.models.transformer.Transformer',
    'a decoder of any pattern of layers',
  ),
  'TransformerConfig': (
    'longctx.models.config.TransformerConfig',
    'the shape of a Transformer',
  ),
  'Generator': (
    'longctx.decoding.sampler.Generator',
    'continues prompts, from KV caches or states',
  ),
  'Prompts': ('longctx.decoding.sampler.Prompts', 'what a Generator continues'),
  'Sampling': (
    'longctx.decoding.sampler.Sampling',
    'how tokens are drawn: temperature, top_k, top_p',
  ),
  'pretrained': (
    'longctx.pretrained',
    "other people's models: load, export",
  ),
  'tasks': ('longctx.tasks', 'synthetic tasks, by name in TASKS'),
  'make_task': ('longctx.tasks.make_task', 'a task by its name'),
  'make_iterator': (
    'longctx.data.pipeline.make_iterator',
    'batches of a task, addressable and resumable',
  ),
  'ExperimentConfig': (
    'longctx.training.config.ExperimentConfig',
    'a task, a model, an optimizer: what a run is',
  ),
  'prepare': (
    'longctx.training.runs.prepare',
    'checks an ExperimentConfig, before it compiles',
  ),
  'train': ('longctx.training.trainer.train', 'trains what was prepared'),
  'Analyzer': (
    'longctx.analysis.analyzer.Analyzer',
    'sinks, induction and retrieval heads of a model',
  ),
}

__all__ = [
  'VARIANTS',
  'Analyzer',
  'Attention',
  'AttentionConfig',
  'ExperimentConfig',
  'Generator',
  'Prompts',
  'Sampling',
  'Transformer',
  'TransformerConfig',
  'dot_product_attention',
  'gated_delta_rule',
  'linear_attention',
  'make_iterator',
  'make_task',
  'masks',
  'parallel',
  'prepare',
  'pretrained',
  'tasks',
  'train',
]

if TYPE_CHECKING:
  from longctx import masks, parallel, pretrained, tasks
  from longctx.analysis.analyzer import Analyzer
  from longctx.attention import VARIANTS, AttentionConfig
  from longctx.attention import make_layer as Attention
  from longctx.data.pipeline import make_iterator
  from longctx.decoding.sampler import Generator, Prompts, Sampling
  from longctx.models.config import TransformerConfig
  from longctx.models.transformer import Transformer
  from longctx.ops.dot_product_attention import dot_product_attention
  from longctx.ops.recurrence import gated_delta_rule, linear_attention
  from longctx.tasks import make_task
  from longctx.training.config import ExperimentConfig
  from longctx.training.runs import prepare
  from longctx.training.trainer import train

__doc__ += '\n' + '\n'.join(
  f'    {name:<23}{text}' for name, (_, text) in _FACE.items()
)


# One thread at a time: modules that import each other in turn are seen half
# made by a second thread that begins elsewhere.
_IMPORTING = threading.RLock()


def __getattr__(name: str) -> Any:
  if name not in _FACE:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  path, _ = _FACE[name]
  module, _, attribute = path.rpartition('.')
  with _IMPORTING:
    if module == __name__:
      value = importlib.import_module(path)
    else:
      value = getattr(importlib.import_module(module), attribute)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*_FACE, *(name for name in globals() if name[:2] == '__')])


def _keep_libtpu_silent() -> None:
  """Tells libtpu of its machine where there is no TPU.

  It is installed as a compiler too (`longctx.plan`, the tests). JAX asks it for
  devices all the same, and it would complain of the machine in several lines.
  """
  nodes = ('/dev/accel*', '/dev/vfio/[0-9]*')
  if 'JAX_FORCE_TPU_INIT' in os.environ or any(map(glob.glob, nodes)):
    return
  for name, value in {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    # Its log, from errors on.
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_STDERR_LOG_LEVEL': '3',
  }.items():
    os.environ.setdefault(name, value)


_keep_libtpu_silent()
