"""longctx: long-context attention as masks and recurrences, in JAX."""

__version__ = '0.1.0'
