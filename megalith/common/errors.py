"""The errors a user can meet. Each says what is wrong: the rule, the value found, the cure."""

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
    """A run that cannot usefully continue: it diverged, or its data holds nothing to learn. All ranks raise it."""


class RankError(MegalithError):
    """Contact with another process of the run was lost."""


def problem(what: str, found: object, rule: str, cure: str) -> str:
    """One message: problem("--num-query-groups", 3, "must divide --num-attention-heads, 4", "Write 2 or 4") is
    "--num-query-groups must divide --num-attention-heads, 4; found 3. Write 2 or 4."
    """
    return f"{what} {rule}; found {found!r}. {cure}."
