"""Costs of attention and of programs: FLOPs, bytes, memory and overlap."""
