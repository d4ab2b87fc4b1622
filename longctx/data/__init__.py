"""Data pipelines: batches of examples, prepared datasets, token streams."""
