"""Attention variants: one file each, and nothing else."""
