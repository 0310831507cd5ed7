"""Helpers for our tests and for users' tests: many ranks on one CPU, without a launcher."""

from megalith.testing.ranks import RankPool, run_ranks

__all__ = ["RankPool", "run_ranks"]
