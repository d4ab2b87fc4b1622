"""Planning a pod: what a config costs on a machine that is not there.

    python -m longctx.plan --config=configs/ring_1m.py:pod --topology=v5p:4x4x8

compiles the training step with the compiler of that machine and reads memory,
traffic and the order of work from the result; times come from the formulas and
the figures of `chips`.
"""
