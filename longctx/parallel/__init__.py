"""Attention over sequences that no single device holds."""
