"""The shape letters of the library and the array types that carry them.

Every annotation and every einsum uses the same capitals:

  B batch            T query length      S key length
  N query heads      K key/value heads   G = N / K, query heads per key head
  H head dim (q, k)  V value head dim    D model dim      F MLP dim
  C chunk length     P feature-map dim   W kernel width   R ring shards
  Q places of T that are read

Vocabulary size is also written V where no value dim is near. Attention
arrays are BTNH (queries) and BSKH (keys and values).

The shapes are checked under pytest by jaxtyping's import hook and never at run
time.
"""

from jaxtyping import Array, Bool, Float, Int, Key, Num, Shaped

__all__ = ['Array', 'Bool', 'Float', 'Int', 'Key', 'Num', 'Shaped']
