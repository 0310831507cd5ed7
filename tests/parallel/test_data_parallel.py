"""Replicas: buckets in one order, one sum a step, unused parameters; the sharded dimension with tensor parallelism."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from megalith.common.errors import ConfigError
from megalith.parallel import data_parallel
from megalith.parallel.data_parallel import Replicas, shard_dim
from megalith.testing import run_ranks
from megalith.testing.parity import measure
from tests.parity.cases import config_of


class Branches(nn.Module):
    """Which of two layers is used depends on the rank; a third never is."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        for number, layer in enumerate(self.layers):
            nn.init.constant_(layer.weight, number + 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[dist.get_rank()](x)


def branches(bucket: int) -> tuple[list, int]:
    model = Branches()
    with mock.patch.object(data_parallel, "BUCKET", bucket):
        replicas = Replicas(model, dist.init_device_mesh("cpu", (2,)))
    for step in range(2):
        for micro in range(3):
            replicas.set_gradient_sync(last=micro == 2)
            model(torch.full((1, 2), 1.0 + dist.get_rank() + step)).sum().backward()
            assert replicas.started == 0 or micro == 2
        replicas.finish()
        gradients = [layer.weight.grad.clone() for layer in model.layers]
        model.zero_grad(set_to_none=True)
    return gradients, len(replicas.buckets)


@pytest.mark.parametrize(("bucket", "number"), [(4, 3), (8, 2), (1 << 20, 1)])
def test_ranks_that_use_different_parameters(bucket: int, number: int) -> None:
    for gradients, buckets in run_ranks(branches, 2, bucket):
        assert buckets == number
        expected = [torch.full((2, 2), 3 * 2.0), torch.full((2, 2), 3 * 3.0), torch.zeros(2, 2)]
        assert all(torch.equal(gradient, other) for gradient, other in zip(gradients, expected, strict=True))


def many_buckets() -> float:
    config = config_of("absolute", "tp2 dp2")
    with mock.patch.object(data_parallel, "BUCKET", 200):  # dozens of sums, more than may be in flight
        found = measure(config, torch.float64)
    expected = measure(config, torch.float64)
    return max(float((found.gradients[name] - gradient).abs().max()) for name, gradient in expected.gradients.items())


def test_the_size_of_buckets_changes_nothing() -> None:
    assert run_ranks(many_buckets, 4) == [0.0] * 4


def placements() -> list:
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))

    def split(rows: int, columns: int | None = None) -> nn.Parameter:
        shape = (rows,) if columns is None else (rows, columns)
        part = torch.empty(shape, device="meta").tensor_split(2)[dist.get_rank()]
        return nn.Parameter(
            DTensor.from_local(
                part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=torch.empty(shape).stride()
            )
        )

    found: list = [shard_dim(nn.Parameter(torch.empty(5, 4)), 4), shard_dim(split(6, 4), 4), shard_dim(split(7, 4), 4)]
    for parameter in (split(7, 6), split(7)):
        try:
            found.append(shard_dim(parameter, 4))
        except ConfigError as error:
            found.append(str(error))
    return found


def test_unequal_parts_are_sharded_along_the_other_dimension() -> None:
    plain, equal, unequal, neither, vector = run_ranks(placements, 2)[0]
    assert (plain, equal, unequal) == (Shard(0), Shard(0), Shard(1))
    assert "shape (7, 6)" in neither and "columns that the 4 data-parallel shards divide" in neither
    assert "shape (7,)" in vector
