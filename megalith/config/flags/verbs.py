"""The words after a verb that trains, pretrain or finetune, as flags."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.config.flags import flags
from megalith.config.flags.text import Problem

FLAGS = (
    *flags.RUN_FLAGS,
    flags.Flag(
        "--world-size", {"world_size": flags.VALUE}, help="with --dry-run: number of processes to check the config for"
    ),
)


def read_pretrain(words: Sequence[str]) -> flags.CommandLine:
    """Of `megalith pretrain`; the model is one of the words that no flag has taken."""
    return flags.read(words, FLAGS)


def read_finetune(words: Sequence[str]) -> flags.CommandLine:
    """Of `megalith finetune`. In Megatron's tasks --keep-last is a switch; here it has a number."""
    bare = [
        at for at, word in enumerate(words)
        if word in ("--keep-last", "--keep_last") and (at + 1 == len(words) or words[at + 1].startswith("--"))
    ]  # fmt: skip
    reading = flags.read([word for at, word in enumerate(words) if at not in bare], FLAGS)
    if bare:
        reading.notices.append("--keep-last without a number is not needed: no sample of a last batch is ever dropped")
    if "task" not in reading.values and reading.words:
        reading.values["task"] = reading.words.pop(0)
    if reading.words:
        rule = "a value follows its flag, and one task follows the verb or --task"
        reading.problems += [Problem((), f"unexpected {word!r}: {rule}") for word in reading.words]
        reading.words = []
    return reading


READERS = {"pretrain": read_pretrain, "finetune": read_finetune}
