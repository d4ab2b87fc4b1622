"""Text generation from the command line: `python -m longctx.generate`."""
