"""Pretrained models: other people's weights and tokenizers, in and out.

model, tokenizer = load('smollm2')        # of fetch, a folder, a file, a hub
export(model, 'exported')                 # transformers loads it
"""

from longctx.pretrained.exporting import export
from longctx.pretrained.loading import Pretrained, load
from longctx.pretrained.source import Source, open_source

__all__ = ['Pretrained', 'Source', 'export', 'load', 'open_source']
