"""Bytes on a rank per parameter of the model, from the storages that are alive: at most those of docs/memory.md."""

import gc
import math

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalith.config.adapters import adapter_shapes
from megalith.config.parameters import parameter_count
from megalith.config.run import RunConfig
from megalith.optim.build import build_optimizer
from megalith.parallel import mesh as meshes
from megalith.runtime.build import build_runtime
from megalith.testing import parity, run_ranks
from tests.parity.cases import SMALL

CONFIG = SMALL.replace(hidden_size=128, ffn_hidden_size=256, vocab_size=128)
PRECISIONS: dict[str, dict] = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
TABLE = {  # (precision, sharding) -> bytes of a parameter on each of d ranks
    ("fp16", "none"): lambda d: 20,
    ("fp16", "optimizer"): lambda d: 4 + 16 / d,
    ("bf16", "none"): lambda d: 18,
    ("bf16", "optimizer"): lambda d: 6 + 12 / d,
    ("fp32", "none"): lambda d: 16,
    ("fp32", "optimizer"): lambda d: 8 + 8 / d,
    ("bf16", "full"): lambda d: 6 + 12 / d,
    ("fp32", "full"): lambda d: 8 + 8 / d,
}
SLACK = 1.03  # small tensors: step counters, ids, norms' padding to equal shards


class Storages(TorchDispatchMode):
    """Knows every storage that an operation returned while it was on, and which of them are alive."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                reference = StorageWeakRef(
                    (leaf._local_tensor if isinstance(leaf, DTensor) else leaf).untyped_storage()
                )
                self.seen[reference.cdata] = reference
        return out

    def live(self) -> int:
        """Bytes alive; storages that fully_shard has emptied have none."""
        gc.collect()
        storages = [torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in self.seen.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)


def measured(config: RunConfig) -> dict[str, float]:
    """Bytes per parameter after each backward pass and after the step; in step two, as step one makes the state."""
    mesh, data, found = meshes.init_mesh(config.parallel), parity.batch(config), {}
    batches = parity.micro_batches(data, config.batch.micro_batch_size, mesh)
    with Storages() as storages:
        runtime = build_runtime(config, mesh)
        optimizer = build_optimizer(config.optimizer, runtime.named_parameters())
        number = sum(parameter.numel() for parameter in runtime.model.parameters())
        for _ in range(2):
            for count, micro in enumerate(batches):
                runtime.stages[0].set_gradient_sync(last=count == len(batches) - 1)
                runtime.model(
                    micro["input_ids"], labels=micro["labels"], loss_weights=micro["loss_mask"]
                ).sum().backward()
                found["between micro-batches" if count < len(batches) - 1 else "after backward"] = (
                    storages.live() / number
                )
            runtime.finish_gradients()
            found["reduced"] = storages.live() / number
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found["after step"] = storages.live() / number
    return found


@pytest.mark.parametrize(("precision", "of_base", "of_adapters"), [("fp32", 4, 16), ("bf16", 4, 18)])
def test_bytes_with_lora(precision: str, of_base: int, of_adapters: int) -> None:
    """As docs/lora.md says; without LoRA they are 16 and 18."""
    config = CONFIG.replace(global_batch_size=2, lora_rank=4, **PRECISIONS[precision])
    adapters = sum(map(math.prod, adapter_shapes(config.model, config.lora).values()))
    base = parameter_count(config.model)
    limit = (of_base * base + of_adapters * adapters) / (base + adapters)
    found = run_ranks(measured, 1, config)[0]
    assert adapters > 5000 and limit < 6
    for moment, value in found.items():
        assert value <= limit * SLACK, (moment, value, limit)


@pytest.mark.parametrize("d", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("precision", "sharding"), TABLE)
def test_bytes_per_parameter(precision: str, sharding: str, d: int) -> None:
    config = CONFIG.replace(global_batch_size=2 * d, data_parallel_sharding=sharding, **PRECISIONS[precision])
    found = run_ranks(measured, d, config)[0]
    limit = TABLE[precision, sharding](d)
    print(precision, sharding, d, limit, {moment: round(value, 2) for moment, value in found.items()})
    # Sums on their way, gone after the wait
    transient = 0.0 if sharding != "none" or precision != "fp32" or d == 1 else 4.0
    for moment, value in found.items():
        extra = transient if moment == "after backward" else 0.0
        assert value <= (limit + extra) * SLACK, (moment, value, limit)
