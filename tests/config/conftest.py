"""Hypothesis without time limits: the machine that runs the tests is shared."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
