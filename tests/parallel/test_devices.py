"""Devices and their collective libraries."""

import pytest
import torch

from megalith.common.errors import ConfigError
from megalith.config.sections.parallel import ParallelConfig
from megalith.parallel.devices import backend_of
from megalith.parallel.mesh import init_distributed

CPU = torch.device("cpu")


def available(monkeypatch, *names):
    monkeypatch.setattr("torch.distributed.is_backend_available", names.__contains__)


def test_the_library_of_a_device():
    assert backend_of(CPU) == "gloo" == backend_of(CPU, "gloo")


def test_a_library_that_this_torch_lacks_is_refused_before_the_group_starts(monkeypatch):
    available(monkeypatch, "gloo")
    with pytest.raises(
        ConfigError,
        match=r"^--distributed-backend must be a library that torch \S+ here .* \(gloo\); found 'nccl'\. Leave",
    ):
        init_distributed(ParallelConfig(distributed_backend="nccl", device="cpu"))
    with pytest.raises(ConfigError, match=r"found 'nccl, which the device cuda needs'\. Install a torch with nccl"):
        backend_of(torch.device("cuda"))


def test_a_library_that_does_not_serve_the_device_is_refused(monkeypatch):
    available(monkeypatch, "gloo", "nccl", "xccl")
    with pytest.raises(
        ConfigError, match=r"must serve cpu, the device of this run, whose library is gloo; found 'nccl'"
    ):
        backend_of(CPU, "nccl")
    assert backend_of(torch.device("cuda"), "gloo") == "gloo" and backend_of(torch.device("xpu")) == "xccl"
