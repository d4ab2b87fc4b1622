"""Decoding: KV caches and recurrent states, sampling and generation."""
