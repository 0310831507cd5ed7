"""The errors a user can meet. Each says what is wrong, the value found, the rule and the cure."""

from __future__ import annotations


class MegalithError(ValueError):
    """Base of every error that is the user's to cure; the command line prints it without a traceback."""


class ConfigError(MegalithError):
    """A flag, a YAML key or a combination of them that cannot work."""


class DataError(MegalithError):
    """A corpus, tokenizer or indexed dataset that cannot be read as what it claims to be."""


class CheckpointError(MegalithError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""


class TrainingError(MegalithError):
    """A run that cannot usefully go on: it has diverged, or there is nothing in its data to learn. Every rank says the same."""


class RankError(MegalithError):
    """Contact with another process of the run was lost."""


def problem(what: str, found: object, rule: str, cure: str) -> str:
    """One line in the order every message of this project keeps: what, the value found, the rule, the cure."""
    return f"{what}: found {found!r}; {rule}. {cure}."
