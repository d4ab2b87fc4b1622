"""Tokenizers of GGUF files, from their metadata."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from longctx.tasks.tokenizer import Tokenizer, add_bos, first_line
from longctx.typing import among

_WORDS = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
)
_CL100K = (
  r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
  r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*'
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_GPT2, _DIGITS = (_WORDS,), (r'\p{N}', _WORDS)
_LLAMA3, _QWEN2 = (_CL100K,), (_CL100K.replace('{1,3}', ''),)

# What a text is split by before bytes are merged, one expression after the
# other, by GGUF's names of pre-tokenizers.
PRE_TOKENIZERS = {
  'codeshell': _DIGITS,
  'command-r': _DIGITS,
  'dbrx': _LLAMA3,
  'deepseek-r1-qwen': _QWEN2,
  'default': (
    r'[\p{P}\$\+<=>\^~\|]+',
    _WORDS,
    r'\p{N}+',
    '[0-9][0-9][0-9]',
  ),
  'exaone': _DIGITS,
  'gpt-2': _GPT2,
  'jais': _GPT2,
  'llama-bpe': _LLAMA3,
  'llama-v3': _LLAMA3,
  'llama3': _LLAMA3,
  'mpt': _GPT2,
  'olmo': _GPT2,
  'phi-2': _GPT2,
  'qwen2': _QWEN2,
  'refact': _DIGITS,
  'smaug-bpe': _LLAMA3,
  'smollm': _DIGITS,
  'stablelm2': _QWEN2,
  'starcoder': _DIGITS,
}
# A word that is a token is taken whole, and BOS is added unless a file says no.
LLAMA3 = ('llama-bpe', 'llama-v3', 'llama3')
# GGUF's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
  """Makes a tokenizer from the metadata of a GGUF file.

  Of `tokenizer.ggml.model`: 'gpt2', byte-level BPE, and 'llama', BPE of
  SentencePiece, whose merges follow from the scores of tokens.

  Raises:
    ValueError: a key is missing.
    NotImplementedError: a kind of tokenizer that is not known here.
  """
  get = functools.partial(_get, metadata)
  kinds = {'gpt2': _byte_level, 'llama': _sentencepiece}
  if (kind := get('model')) not in kinds:
    raise NotImplementedError(
      f'tokenizer.ggml.model={kind!r}{among(kind, kinds)}; or take the '
      "model's own tokenizer.json"
    )
  pre, tokens = get('pre', 'default'), list(get('tokens'))
  types = [*get('token_type', ())]
  types += [NORMAL] * (len(tokens) - len(types))
  backend = kinds[kind](get, pre, tokens, types)
  for token, type_ in zip(tokens, types, strict=True):
    if type_ in (CONTROL, USER_DEFINED):
      special = type_ == CONTROL
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      backend.add_tokens([added])
  bos, eos = get('bos_token_id', None), get('eos_token_id', None)
  stops = (get('eot_token_id', None),)
  template = metadata.get('tokenizer.chat_template')
  made = Tokenizer.of(backend, bos, eos, stops, template)
  begins = get('add_bos_token', kind == 'llama' or pre in LLAMA3)
  if begins and bos is not None:
    add_bos(backend, bos)
  return made


def _byte_level(
  get: Any, pre: str, tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
  """Byte-level BPE: a token's letters stand for its bytes, as in GPT-2."""
  del types
  if pre not in PRE_TOKENIZERS:
    raise NotImplementedError(
      f'tokenizer.ggml.pre={pre!r}{among(pre, PRE_TOKENIZERS)}; or take the '
      "model's own tokenizer.json"
    )
  merges = [tuple(merge.split(' ', 1)) for merge in get('merges')]
  backend = _bpe(tokens, merges, ignore_merges=pre in LLAMA3)
  if pre in ('qwen2', 'deepseek-r1-qwen'):
    backend.normalizer = normalizers.NFC()
  splits = [
    pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
    for pattern in PRE_TOKENIZERS[pre]
  ]
  letters = pre_tokenizers.ByteLevel(
    add_prefix_space=bool(get('add_space_prefix', False)), use_regex=False
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(
  get: Any, pre: str, tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: of two neighbours whose joint is a token, the best.

  U+2581 stands for a space, and tokens <0x00> ... for bytes of what is unknown.
  """
  del pre
  scores, known = get('scores'), set(tokens)
  ranked = []
  for token, type_, score in zip(tokens, types, scores, strict=True):
    if type_ == NORMAL:
      pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
      ranked += [(-score, pair) for pair in pairs if known.issuperset(pair)]
  ranked.sort(key=lambda entry: entry[0])
  backend = _bpe(
    tokens,
    [pair for _, pair in ranked],
    unk_token=tokens[types.index(UNKNOWN)] if UNKNOWN in types else None,
    fuse_unk=True,
    byte_fallback=True,
  )
  spaces = [normalizers.Replace(' ', '\u2581')]
  text = [
    decoders.Replace('\u2581', ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if get('add_space_prefix', True):
    spaces.insert(0, normalizers.Prepend('\u2581'))
    text.append(decoders.Strip(' ', 1, 0))
  backend.normalizer = normalizers.Sequence(spaces)
  backend.decoder = decoders.Sequence(text)
  return backend


def _bpe(
  tokens: Sequence[str], merges: list[tuple[str, ...]], **options: Any
) -> tokenizers.Tokenizer:
  vocab = {token: i for i, token in enumerate(tokens)}
  try:
    return tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
  except Exception as error:
    # tokenizers raises Exception itself.
    raise ValueError(f'tokenizer.ggml.merges: {first_line(error)}') from error


def _get(metadata: Mapping[str, Any], name: str, *default: Any) -> Any:
  key = f'tokenizer.ggml.{name}'
  if key not in metadata and not default:
    raise ValueError(f'the GGUF file has no {key}, which its tokenizer needs')
  return metadata.get(key, *default)
