"""Benchmarks run, and print lines that say what their docstrings promise."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from flax import nnx

from longctx.models import Transformer, TransformerConfig
from longctx.pretrained import export

ROOT = pathlib.Path(__file__).parent.parent


def lines_of(name, *arguments):
  """What a benchmark prints, from a process of its own."""
  done = subprocess.run(
    [sys.executable, ROOT / 'benchmarks' / name, *arguments],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | dict(PYTHONPATH=str(ROOT)),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


def test_ring_is_timed_beside_others():
  lines = lines_of('ring.py', '--quick')
  timed = [line for line in lines if 'seconds' in line]
  others = ['one_device', 'dense']
  others += ['torch'] * bool(importlib.util.find_spec('torch'))
  for pass_ in ('forward', 'forward+backward'):
    schemes = [line['scheme'] for line in timed if line['pass'] == pass_]
    assert schemes == ['ring', 'ulysses', *others]
  for line in timed:
    assert 0 < line['seconds_min'] <= line['seconds']
    assert line['useful_gflops_per_s'] > 0
    assert line['scheme'] == 'dense' or line['dense_seconds_ratio'] > 0
  peaks = [line for line in lines if 'peak_bytes' in line]
  assert [line['devices'] for line in peaks] == [2, 4] * 2
  assert all(line['T'] == 128 * line['devices'] for line in peaks)


def test_decoding_is_timed_at_every_context():
  lines = lines_of('decode.py', '--quick')
  timed = [line for line in lines if 'seconds' in line]
  assert [line['context'] for line in timed] == [16] * 3 + [32] * 3
  assert [line['row_bytes'] for line in timed[3:]] == [4608, 1024, 576]
  assert ['recompute_ratio' in line for line in timed] == [0, 1, 0] * 2
  for line in timed:
    assert 0 < line['seconds_min'] <= line['seconds']
  assert len([line for line in lines if 'growth' in line]) == 3


def test_a_pretrained_model_is_timed(tmp_path):
  config = TransformerConfig(vocab_size=256, mlp_dim=64, mlp='swiglu')
  export(Transformer(config, rngs=nnx.Rngs(0)), tmp_path, family='llama')
  machine, ours, shares = lines_of(
    'pretrained.py', '--quick', '--peers=', f'--source={tmp_path}'
  )
  assert machine['machine']['read_gb_per_s'] > 0
  assert ours['program'] == 'longctx' and ours['prefill'] > 0
  assert ours['decode'].keys() == {'32'}
  assert shares['shares'].keys() == {'share_of_reading_weights'}


def test_layers_are_timed_at_every_length():
  lines = lines_of('variants.py', '--quick', '--variants=full,linear', '--hf=0')
  timed = [line for line in lines if 'seconds' in line]
  assert len(timed) == 2 * 2 * 2
  for line in timed:
    assert 0 < line['seconds_min'] <= line['seconds']
    assert line['peak_bytes'] > 4 * line['T'] * line['D']
  growth = [line for line in lines if 'doubling' in line]
  assert [line['layer'] for line in growth] == ['full', 'linear'] * 2
  assert all(line['memory_doubling']['128'] > 1 for line in growth)


def test_analysis_is_timed_in_training_and_on_long_sequences():
  training, long = lines_of('analysis.py', '--quick')
  assert training['analysis_seconds'] > 0 and training['share'] > 0
  assert long['seconds'] > 0 and long['peak_memory'] > 0
  assert len(long['prefix_matching']) == len(long['sink_rate']) == 1
