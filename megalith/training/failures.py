"""Failures in a run of several processes: each process ends with a message that names its rank and its last step.

A dead process is noticed by those that communicate with it: under gloo at once, if its machine is still up, otherwise
after --distributed-timeout-minutes. All are at the same step, since every step ends with a sum over all processes.
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

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a limit on files is full
# gloo raises RuntimeErrors: their texts have its file names, a socket's message, or that it gave up waiting.
COLLECTIVE_ERROR = re.compile(
    r"gloo/|Connection (closed|reset) by peer|pair closure|Broken pipe|NCCL (error|communicator)", re.IGNORECASE
)
# The error of a library that torch.compile was writing when its process was killed.
TRUNCATED_LIBRARY = re.compile(r"(\S+\.so): (?:file too short|invalid ELF header)")


@contextlib.contextmanager
def explain_errors(progress: Progress, next_start: Callable[[], str] | None = None) -> Iterator[None]:
    """Around steps: errors get this rank and its last step added; one of a collective becomes a RankError.

    next_start: what the next start does, as text.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL and next_start:
            raise TrainingError(f"After step {progress.iteration}: {error}. Free space; {next_start()}.") from error
        if truncated := TRUNCATED_LIBRARY.search(str(error)):
            raise TrainingError(
                f"After step {progress.iteration}: {error}; torch.compile keeps what it compiled, and a process that "
                f"was killed left this file incomplete. "
                f"Delete {truncated[1]}{f'; {next_start()}' if next_start else ''}."
            ) from error
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        if isinstance(error, TrainingError):  # of the run, not of a rank
            raise
        where = f"rank {dist.get_rank()} of {dist.get_world_size()}, after step {progress.iteration}"
        cause = find_collective_error(error)
        if cause is None:
            if isinstance(error, MegalithError):  # shown as one message, without notes
                raise type(error)(f"{error} (on {where})") from error
            error.add_note(f"on {where}")
            raise
        then = f" {next_start()[0].upper()}{next_start()[1:]}." if next_start else ""
        first_line = str(cause).strip().partition("\n")[0]
        raise RankError(
            f"{where}: contact with another rank was lost: it died, failed, or was silent for "
            f"--distributed-timeout-minutes. Its last messages and the launcher's report name it.{then} ({first_line})"
        ) from error


def find_collective_error(error: BaseException | None) -> BaseException | None:
    """The error of a collective that caused `error`, which others may have wrapped (pipeline schedules do).

    None where no collective failed.
    """
    while error is not None:
        if isinstance(error, dist.DistError):
            return error
        if isinstance(error, RuntimeError) and COLLECTIVE_ERROR.search(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def check_same_config(config: RunConfig) -> None:
    """Raise ConfigError on every rank, naming the fields, where not all ranks were started with one config.

    Without this they would wait for each other in different collectives, or train different models without notice.
    """
    if differing := Ranks().collect(config.flat, _differing):
        more = f" (and {len(differing) - 8} more)" if len(differing) > 8 else ""
        raise ConfigError(
            f"The ranks were started with different configs: {'; '.join(differing[:8])}{more}; all ranks train one "
            f"model in one way. Start every rank with the same flags and files."
        )


def _differing(flats: list[dict]) -> list[str]:
    """Where the configs of ranks differ from that of rank 0, as text."""
    return [
        f"{flag(name)} is {flats[0][name]!r} on rank 0 and {value!r} on rank {rank}"
        for rank, flat in enumerate(flats)
        for name, value in flat.items()
        if value != flats[0][name]
    ]
