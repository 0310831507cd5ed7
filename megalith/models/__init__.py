"""Whole models, the mathematics only: they are written for one process and do not know how they are split."""
