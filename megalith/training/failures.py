"""Failures in a run of several processes: each of them ends, and says which it is and how far it came.

A dead process is noticed by those that talk to it: under gloo at once, where its machine lives, and otherwise after
--distributed-timeout-minutes. Its own step is theirs too, since every step ends with a sum over all processes.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

import torch.distributed as dist

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, MegalithError, RankError, TrainingError
from megalith.config.flags.text import flag
from megalith.config.run import RunConfig
from megalith.training.resume.state import Progress

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk is full, or what one may use of it
# gloo raises plain RuntimeErrors: they have its file names, what its sockets say, or that it gave up waiting.
BROKEN = re.compile(
    r"gloo/|Connection (closed|reset) by peer|pair closure|Broken pipe|NCCL (error|communicator)", re.IGNORECASE
)
TRUNCATED = re.compile(
    r"(\S+\.so): (?:file too short|invalid ELF header)"
)  # what torch.compile stored while it was killed


@contextlib.contextmanager
def named(progress: Progress, again: Callable[[], str] | None = None) -> Iterator[None]:
    """Around steps: an error that leaves names this rank and its last step; one of a collective becomes a RankError.

    again: what the next start does, in words.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL and again:
            raise TrainingError(f"after step {progress.iteration}: {error}. Free space; {again()}.") from error
        if broken := TRUNCATED.search(str(error)):
            raise TrainingError(
                f"after step {progress.iteration}: {error}; torch.compile keeps what it compiled, and a process that was killed "
                f"left this file in part. Delete {broken[1]}{f'; {again()}' if again else ''}."
            ) from error
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        if isinstance(error, TrainingError):  # of the run, not of a rank
            raise
        place = f"rank {dist.get_rank()} of {dist.get_world_size()}, after step {progress.iteration}"
        cause = broken_collective(error)
        if cause is None:
            if isinstance(error, MegalithError):  # shown as one message, without notes
                raise type(error)(f"{error} (on {place})") from error
            error.add_note(f"on {place}")
            raise
        then = f" {again()[0].upper()}{again()[1:]}." if again else ""
        first_line = str(cause).strip().partition("\n")[0]
        raise RankError(
            f"{place}: contact with another rank was lost: it died, failed, or was silent for --distributed-timeout-minutes. Its own "
            f"last words and the launcher's report name it.{then} ({first_line})"
        ) from error


def broken_collective(error: BaseException | None) -> BaseException | None:
    """The error of a collective behind `error`, which others may have wrapped (pipeline schedules do); None where there is none."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and BROKEN.search(str(error))):
            return error
        error = error.__cause__ or error.__context__
    return None


def same_config(config: RunConfig) -> None:
    """Raise ConfigError on every rank, naming the fields, where not all ranks were started with one config.

    Without this they would wait for one another in different collectives, or train different models in silence.
    """
    if differing := Ranks().collect(config.flat, _differing):
        more = f" (and {len(differing) - 8} more)" if len(differing) > 8 else ""
        raise ConfigError(
            f"the ranks were started with different configs: {'; '.join(differing[:8])}{more}; all ranks train one model in one way. "
            f"Start every rank with the same flags and files."
        )


def _differing(flats: list[dict]) -> list[str]:
    """In words, where the configs of ranks differ from that of rank 0."""
    return [
        f"{flag(name)} is {flats[0][name]!r} on rank 0 and {value!r} on rank {rank}"
        for rank, flat in enumerate(flats)
        for name, value in flat.items()
        if value != flats[0][name]
    ]
