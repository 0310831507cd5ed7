"""Errors of collectives, and what is added to others. tests/resume/test_failures.py kills real ranks."""

import pytest
import torch
import torch.distributed as dist

from megalith.common.errors import DataError, RankError, TrainingError
from megalith.training.failures import explain_errors, find_collective_error
from megalith.training.resume.state import Progress


def test_a_broken_collective_is_found_behind_what_others_made_of_it():
    broken = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
    )
    outer = RuntimeError("stage 1 failed to run its forward pass")
    outer.__cause__ = broken
    assert find_collective_error(outer) is find_collective_error(broken) is broken
    assert find_collective_error(dist.DistBackendError("of any text")) is not None
    for other in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("Connection closed by peer"),
        None,
    ):
        assert find_collective_error(other) is None


def raising(error: Exception) -> None:
    """On each rank of a pool, the same error on all."""
    with explain_errors(Progress(iteration=7)):
        raise error


def test_errors_name_rank_and_step(ranks):
    with pytest.raises(DataError, match=r"^no such document \(on rank \d of 2, after step 7\)"):
        ranks(raising, 2, DataError("no such document"))
    with pytest.raises(
        RankError, match=r"^rank \d of 2, after step 7: contact with another rank was lost: .*pair closure"
    ):
        ranks(raising, 2, RuntimeError("Application timeout caused pair closure"))
    with pytest.raises(RuntimeError, match="shapes") as caught:
        ranks(raising, 2, RuntimeError("shapes"))
    assert any(note.endswith("of 2, after step 7") for note in caught.value.__notes__)


def test_one_process_needs_no_names():
    with pytest.raises(RuntimeError, match="shapes") as caught, explain_errors(Progress()):
        raise torch.OutOfMemoryError("shapes")
    assert not getattr(caught.value, "__notes__", [])


def test_a_compiled_file_of_a_killed_process_is_named():
    """So ended a compiled run beside one that had been killed."""
    with pytest.raises(
        TrainingError, match=r"^After step 0: .*file too short; .* Delete /tmp/inductor/tb/c7.main.so; go on.$"
    ):
        with explain_errors(Progress(), lambda: "go on"):
            raise ImportError("/tmp/inductor/tb/c7.main.so: file too short")
