"""Loading: any layout into any layout, bit for bit; what is missing, damaged or of another shape is named."""

import pathlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megalith import checkpoint
from megalith.checkpoint.store.facts import CONFIG
from megalith.checkpoint.store.loading import read_tensors
from megalith.common.errors import CheckpointError

SHAPES = {"a": (7, 6), "b": (5,), "c": (2, 3, 4), "d": (8, 4), "e": (1, 3), "f": ()}
YAML = "model: {num_layers: 2, hidden_size: 6, num_attention_heads: 2, vocab_size: 7}\n"


def full_tensors():
    draw = torch.Generator().manual_seed(3)
    return {f"model/{name}": torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


class Model(nn.Module):
    """Parameters of the shapes above, placed in one of many ways; what fully_shard makes of them are _StridedShards."""

    def __init__(self, layout, fill):
        super().__init__()
        tensors = {
            name.removeprefix("model/"): tensor if fill else torch.full_like(tensor, -1.0)
            for name, tensor in full_tensors().items()
        }
        kind, *sizes = layout
        meshes = {
            "tp": ("tp",),
            "fsdp": ("dp",),
            "dp tp": ("dp", "tp"),
            "hsdp": ("replicate", "shard"),
            "2d": ("x", "y"),
            "plain": (),
        }[kind]
        mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=meshes) if meshes else None
        for number, (name, tensor) in enumerate(tensors.items()):
            if kind in ("tp", "dp tp"):
                tensor = distribute_tensor(tensor, mesh["tp"], [Shard(number % 2) if tensor.dim() > 1 else Replicate()])
            if kind == "2d":
                tensor = distribute_tensor(
                    tensor, mesh, [Shard(0), Shard(tensor.dim() - 1)] if tensor.dim() else [Replicate()] * 2
                )
            if tensor.dim():
                setattr(self, name, nn.Parameter(tensor))
            else:  # fully_shard takes no scalars
                self.register_buffer(name, tensor)
        if kind in ("fsdp", "hsdp"):
            fully_shard(self, mesh=mesh)
        if kind == "dp tp":
            fully_shard(self, mesh=mesh["dp"])

    def named(self):
        return {f"model/{name}": tensor for name, tensor in [*self.named_parameters(), *self.named_buffers()]}


def write(folder, layout):
    checkpoint.save(folder, 3, Model(layout, fill=True).named(), train_state={"samples": 12}, config_yaml=YAML)


def read(folder, layout):
    state = Model(layout, fill=False).named()
    train_state = checkpoint.load(folder, state)
    return train_state["samples"], {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
        for name, tensor in state.items()
    }


def equal(found):
    return all(torch.equal(found[name], tensor) for name, tensor in full_tensors().items())


@pytest.mark.parametrize(
    "layout", [("dp tp", 2, 2), ("hsdp", 2, 2), ("2d", 2, 2), ("fsdp", 3), ("tp", 4), ("plain",)], ids=str
)
def test_any_layout_into_any_layout(tmp_path, ranks, layout):
    size = {1: 1, 2: layout[-1], 3: 4}[len(layout)]
    ranks(write, size, str(tmp_path), layout)
    path = checkpoint.find(tmp_path)
    assert checkpoint.verify(path) == [] and equal(checkpoint.read_full(path))
    assert sum(tensor.numel() for tensor in full_tensors().values()) == checkpoint.describe(path)["parameters"]["model"]
    for other in [("dp tp", 2, 2), ("2d", 1, 3), ("tp", 2), ("fsdp", 4), ("plain",)]:
        if other != layout:
            size = {1: 2, 2: other[-1], 3: other[-1] * other[-2] if len(other) > 2 else 0}[len(other)]
            assert all(samples == 12 and equal(found) for samples, found in ranks(read, size, str(tmp_path), other)), (
                other
            )


def pipeline(folder):
    """Each rank holds its own layers; both hold the tied embedding. Then the layers change places."""
    rank = dist.get_rank()
    checkpoint.save(
        folder,
        1,
        {f"model/layers.{rank}": torch.full((3,), rank), "model/tied": torch.ones(2)},
        train_state={},
        config_yaml="",
    )
    state = {f"model/layers.{1 - rank}": torch.zeros(3, dtype=torch.int64)} | (
        {"model/tied": torch.zeros(2)} if rank else {}
    )
    checkpoint.load(folder, state)
    with pytest.raises(CheckpointError, match=r"model/layers\.1: in the checkpoint, not asked for") as caught:
        checkpoint.load(folder, {"model/layers.0": torch.zeros(3), "model/tied": torch.zeros(2)})
    return state, str(caught.value)


def test_pipeline_stages(tmp_path, ranks):
    (first, message), (second, other) = ranks(pipeline, 2, str(tmp_path))
    assert (
        first["model/layers.1"].tolist() == [1, 1, 1]
        and second["model/layers.0"].tolist() == [0, 0, 0]
        and message == other
    )
    assert second["model/tied"].tolist() == [1, 1]


@pytest.fixture
def saved(tmp_path):
    state = {
        "model/embedding.weight": torch.randn(7, 6),
        "model/b": torch.randn(4).double(),
        "optimizer/step/b": torch.tensor(9.0),
    }
    for iteration in (1, 2):
        checkpoint.save(tmp_path, iteration, state, train_state={}, config_yaml=YAML)
    return tmp_path, state


def test_weights_alone_and_other_dtypes(saved):
    folder, state = saved
    into = {"model/embedding.weight": torch.zeros(7, 6, dtype=torch.bfloat16), "model/b": torch.zeros(4)}
    checkpoint.load(folder, into, iteration=1)
    assert torch.equal(into["model/embedding.weight"], state["model/embedding.weight"].bfloat16())
    assert torch.equal(into["model/b"], state["model/b"].float())
    parameter, strided = nn.Parameter(torch.zeros(7, 6)), torch.zeros(8)[::2]
    checkpoint.load(folder, {"model/embedding.weight": parameter, "model/b": strided})
    assert torch.equal(parameter, state["model/embedding.weight"]) and torch.equal(strided, state["model/b"].float())


def test_misfits_are_listed_with_their_cure(saved):
    folder, _ = saved
    state = {"model/embedding.weight": torch.full((7, 12), 5.0), "model/layers.2.norm.weight": torch.zeros(6)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, state)
    text = str(caught.value)
    assert "model/embedding.weight: the checkpoint has [7, 6], asked for is [7, 12] -> --hidden-size 6" in text
    assert "model/layers.2.norm.weight: asked for, not in the checkpoint -> --num-layers 2" in text
    assert "model/b: in the checkpoint, not asked for" in text and "optimizer" not in text
    assert (state["model/embedding.weight"] == 5.0).all()  # nothing was touched
    with pytest.raises(CheckpointError, match="--hidden-size 6"):
        checkpoint.load(folder, state, strict=False)  # shapes must fit in any case
    del state["model/embedding.weight"]
    checkpoint.load(folder, state, strict=False)


def test_damage_is_named_and_the_newest_good_one_offered(saved):
    folder, state = saved
    file = next(path for path in (folder / "iter_0000002").glob("*.distcp") if path.stat().st_size > 1000)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"(?s){file.name} is damaged: its SHA-256.*--ckpt-step 1\."):
        checkpoint.load(folder, state)
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged: it has {len(data) - 1} bytes"):
        checkpoint.load(folder, state, checksums=False)
    checkpoint.load(folder, state, iteration=1)


def test_tensors_one_by_one(saved):
    folder, state = saved
    path = checkpoint.find(folder)
    stream = read_tensors(path)
    assert iter(stream) is stream and [name for name, _ in stream] == sorted(state)
    assert checkpoint.read_full(path, ["model/b"])["model/b"].dtype == torch.float64
    with pytest.raises(CheckpointError, match="model/c: not in the checkpoint"):
        checkpoint.read_full(path, ["model/b", "model/c"])


def test_the_first_schema_still_loads():
    path = checkpoint.find(pathlib.Path(__file__).parents[1] / "data" / "v1")
    assert checkpoint.verify(path) == [] and checkpoint.describe(path)["schema"] == 1
    state = {
        "model/embedding.weight": torch.zeros(4, 3),
        "model/final_norm.weight": torch.zeros(3, dtype=torch.bfloat16),
    }
    train_state = checkpoint.load(path, state)
    assert train_state["consumed_train_samples"] == 160 and train_state["iteration"] == 5
    assert torch.equal(state["model/embedding.weight"], torch.arange(12.0).view(4, 3) / 7)
    assert torch.equal(state["model/final_norm.weight"], torch.tensor([1, 0.5, -2], dtype=torch.bfloat16))
    optimizer = {
        "optimizer/exp_avg/embedding.weight": torch.ones(4, 3),
        "optimizer/step/embedding.weight": torch.tensor(0.0),
    }
    checkpoint.load(path, optimizer, strict=False)
    assert optimizer["optimizer/step/embedding.weight"] == 5 and "hidden_size: 3" in (path / CONFIG).read_text()
