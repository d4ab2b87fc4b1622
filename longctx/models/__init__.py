"""Transformer language models built from a pattern of attention layers."""
