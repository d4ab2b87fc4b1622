"""Attention as pure functions of arrays: no modules, no configs, no meshes."""
