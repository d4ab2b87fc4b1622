"""Pretrained models: other people's weights, and the files they come in."""
