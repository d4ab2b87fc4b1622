"""What a model does, measured: so far, what an output can read."""
