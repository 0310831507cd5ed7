"""Whole models, maths only: they know of one process, and of nothing that splits them."""
