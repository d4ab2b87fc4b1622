"""Writer of small GGUF files."""

import struct

import numpy as np


def _text(text):
  return struct.pack('<Q', len(text.encode())) + text.encode()


def _value(value):
  """Type and bytes of metadata: bool, int, float, text, or a list of them."""
  if isinstance(value, list):
    parts = [_value(x) for x in value]
    kind = parts[0][0] if parts else 4
    packed = struct.pack('<IQ', kind, len(value)) + b''.join(
      p for _, p in parts
    )
    return 9, packed
  if isinstance(value, str):
    return 8, _text(value)
  kind, code = {bool: (7, '?'), int: (4, 'I'), float: (6, 'f')}[type(value)]
  return kind, struct.pack(f'<{code}', value)


def write(path, metadata, tensors, version=3):
  """Writes tensors of float32, or (type, shape, bytes) as they stand."""
  header = struct.pack('<4sIQQ', b'GGUF', version, len(tensors), len(metadata))
  for key, value in metadata.items():
    kind, packed = _value(value)
    header += _text(key) + struct.pack('<I', kind) + packed
  alignment = metadata.get('general.alignment', 32)
  body = b''
  for name, tensor in tensors.items():
    if isinstance(tensor, np.ndarray):
      tensor = (0, tensor.shape, tensor.astype('<f4').tobytes())
    kind, shape, packed = tensor
    sizes = struct.pack(f'<I{len(shape)}Q', len(shape), *reversed(shape))
    header += _text(name) + sizes + struct.pack('<IQ', kind, len(body))
    body += packed + bytes(-len(packed) % alignment)
  header += bytes(-len(header) % alignment)
  path.write_bytes(header + body)
  return path
