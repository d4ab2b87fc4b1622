"""Full disks: one line that names the file, and what is safe."""

import os
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest

from longctx.training import runs, trainer
from longctx.training.errors import WriteError
from longctx.training.log_files import JsonLog
from tests.tiny import tiny_config
from tests.training.test_trainer import ROOT, final_leaves, run_to_end

NO_SPACE = 'No space left on device'

# Larger files are refused as on a full disk, in Orbax's threads too.
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def save_until_10(self, step, save=ocp.CheckpointManager.save, **kwargs):
  if step >= 10:
    # As TensorStore says it.
    raise ValueError(
      f'RESOURCE_EXHAUSTED: Error writing local file: {NO_SPACE}'
    )
  return save(self, step, **kwargs)


def append_until_8(self, row, append=JsonLog.append):
  if row['step'] >= 8:
    raise WriteError(f'{self.path} cannot be written: {NO_SPACE}')
  append(self, row)


@pytest.mark.parametrize(
  ('owner', 'name', 'fails', 'what'),
  [
    (ocp.CheckpointManager, 'save', save_until_10, 'checkpoints takes no'),
    (JsonLog, 'append', append_until_8, 'metrics.jsonl cannot be written'),
  ],
)
def test_a_full_disk_names_the_file_and_the_last_good_checkpoint(
  tmp_path, monkeypatch, owner, name, fails, what
):
  config = tiny_config()
  with monkeypatch.context() as patch:
    patch.setattr(owner, name, fails)
    with pytest.raises(WriteError, match=what) as error:
      run_to_end(config, tmp_path / 'full')
  assert f'{NO_SPACE}; checkpoint 5 is the last good one' in str(error.value)
  assert '\n' not in str(error.value)
  # With room again the same command goes on.
  trainer.train(runs.prepare(config, tmp_path / 'full'), tmp_path / 'full')
  run_to_end(config, tmp_path / 'whole')
  assert final_leaves(tmp_path / 'full') == final_leaves(tmp_path / 'whole')


def test_a_disk_that_fills_while_orbax_writes_ends_in_one_line(tmp_path):
  env = {k: v for k, v in os.environ.items() if 'JAX_COMPILATION' not in k}
  done = subprocess.run(
    [
      *(sys.executable, '-c', LIMITED, str(ROOT / 'train.py')),
      f'--config={ROOT / "configs" / "default.py"}',
      '--config.steps=2',
      '--config.task.seq_len=16',
      '--config.task.vocab_size=16',
      '--config.task.num_pairs=2',
      '--config.model.d_model=64',
      f'--workdir={tmp_path}',
    ],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert 'Traceback' not in done.stderr
  *_, last = done.stderr.splitlines()
  assert last.startswith(f'error: {tmp_path}/checkpoints takes no checkpoint: ')
  assert last.endswith('File too large; there is no checkpoint yet')
  assert not list(tmp_path.glob('checkpoints/*'))
