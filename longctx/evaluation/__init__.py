"""Evaluation of trained models: sweeps, endless streams, System 2 Attention."""
