"""Helpers for the tests of megalith and of its users: many ranks on one CPU, without a launcher."""

from megalith.testing.ranks import RankPool, run_ranks

__all__ = ["RankPool", "run_ranks"]
