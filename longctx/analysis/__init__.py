"""Interpretability: sinks, induction heads, retrieval, leaks and capacity."""
