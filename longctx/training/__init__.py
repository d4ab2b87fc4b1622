"""Training: configs, runs, optimizers, checkpoints, metrics, the loop."""
