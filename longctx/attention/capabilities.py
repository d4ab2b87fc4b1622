"""Capabilities that a config asks of a layer, and the words of refusals.

A variant lists in `Attention.unsupported` what it lacks, with the reason. The
layer refuses by that list, the tests run every cell that is not on it, and
docs/capabilities.md prints both, so that the three cannot disagree.
"""

CAPABILITIES = {
  'float32': 'outputs and gradients are those of the equation in float64',
  'bfloat16': 'likewise, up to the rounding of inputs and outputs',
  'short': 'sequences shorter than a block or a chunk',
  'causal': 'reads the past alone, by gradients and by perturbation',
  'eager': 'the same without jit',
  'extremes': 'finite where logits reach 10,000, gradients too',
  'second_derivative': 'Hessian-vector products are those of the equation',
  'query_indices': 'outputs at a few places alone',
  'decode': 'token by token or chunk by chunk, in rows of any length',
  'sharded_decode': 'likewise, with what it keeps spread over several devices',
  'gqa': 'query heads that share key heads',
  'rope': 'rotary positions',
  'alibi': 'logits that fall with distance',
  'qk_norm': (
    'norms of queries and keys, biases, and rotary positions of a part of the '
    'head, scaled'
  ),
  'scale': 'a scale of the logits other than 1/√H',
  'soft_cap': 'logits that a tanh bounds',
  'dropout': 'of attention weights, the same ones on any mesh',
  'short_conv': 'a convolution over queries, keys and values',
  'analysis': 'what a token gets of each other, for the scores of heads',
  'packing': 'documents in a row that do not read each other',
  'ring': 'the sequence on several devices, by this scheme or its state scan',
  'ulysses': 'likewise',
  'all_gather': 'likewise',
  'ring+ulysses': 'likewise, over two axes of the mesh',
  'contiguous': 'this layout of the sequence on the devices',
  'zigzag': 'likewise',
  'striped': 'likewise',
  'model': 'heads on several devices',
  'pallas': 'kernels for TPUs, forward and backward',
}

# What holds where a query chooses what it reads.
OF_SELECTIONS = {
  'pallas': (
    'what a query chooses is gathered, for which there is no kernel yet: take '
    'no implementation, or xla'
  ),
  'soft_cap': (
    'what is gathered has no soft cap: give the layer attention_soft_cap=None'
  ),
}

# What holds where logits have a bias, which would be capped too.
OF_BIASES = {
  'soft_cap': (
    'its logits have a bias that a cap would bend: give the layer '
    'attention_soft_cap=None'
  ),
}

# What holds for anything that passes a state from token to token.
OF_RECURRENCES = {
  'alibi': (
    'there are no logits for ALiBi to lower: take rope, learned or no positions'
  ),
  'scale': (
    'there are no logits to scale: give the layer attention_scale=None'
  ),
  'soft_cap': (
    'there are no logits to cap: give the layer attention_soft_cap=None'
  ),
  'dropout': (
    'there are no weights per key to drop: give the layer attention_dropout=0.0'
  ),
  'striped': (
    'a state passes from token to token, and neighbours lie on different '
    'devices: take contiguous or zigzag'
  ),
}
