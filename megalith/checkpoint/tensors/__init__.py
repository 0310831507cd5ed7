"""Tensors in files, read lazily, a box at a time, without running a pickle."""
