"""Context parallelism: tokens of each process, attention equal to one process's, one gather per layer, equal losses."""

import types

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.common.errors import ConfigError
from megalith.layers.attention import CoreAttention
from megalith.layers.dropout import row_keys
from megalith.layers.mask import AttentionMask
from megalith.layers.positions import alibi_slopes
from megalith.parallel.collectives import Axis
from megalith.parallel.context import ContextAttention, shard_batch, token_positions
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from megalith.training.tasks import Task
from tests.tiny import losses, records, tiny_config, write_corpus

BATCH, HEADS, LENGTH, QUERIES, WIDTH = 2, 4, 24, 12, 8  # QUERIES: of the other sequence, in cross attention


def axis(rank: int, size: int):
    """What `token_positions` and `shard_batch` ask of an Axis, without processes."""
    return types.SimpleNamespace(rank=rank, size=size)


@given(st.integers(1, 8), st.integers(1, 5))
def test_every_token_is_held_once_and_the_work_is_equal(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    held = [token_positions(length, axis(rank, size)) for rank in range(size)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    assert len({int((positions + 1).sum()) for positions in held}) == 1  # keys that the queries of a process see
    assert all(positions.tolist() == sorted(positions.tolist()) for positions in held)


def test_a_length_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match=r"divisible by 8, .*--context-parallel-size 4 cuts it; found 18\. Use 16 or 24\."
    ):
        token_positions(18, axis(0, 4))
    with pytest.raises(ConfigError, match=r"Use 8\."):
        token_positions(3, axis(0, 4))


def test_shard_batch_takes_tokens_and_leaves_the_rest() -> None:
    batch = {
        "input_ids": torch.arange(16).view(2, 8),
        "documents": torch.zeros(2, 8),
        "samples": torch.arange(2),
        "wide": torch.arange(48).view(2, 8, 3),
    }
    shard = shard_batch(batch, axis(1, 2), Task.sequences)
    assert shard["coordinates"].tolist() == [2, 3, 4, 5] and shard["input_ids"].tolist() == [
        [2, 3, 4, 5],
        [10, 11, 12, 13],
    ]
    assert torch.equal(shard["wide"], batch["wide"][:, 2:6])
    assert shard["samples"] is batch["samples"] and shard["documents"] is batch["documents"]


def test_part_of_several_choices() -> None:
    ids = torch.arange(48).view(2, 3, 8)
    batch = {"input_ids": ids, "labels": torch.zeros(2), "padding_mask": ids, "wide": ids[:, 0]}
    shard = shard_batch(batch, axis(1, 2), Task.sequences)
    assert torch.equal(shard["input_ids"], ids[..., 2:6]) and shard["coordinates"].tolist() == [2, 3, 4, 5]
    assert shard["padding_mask"] is ids and shard["wide"].shape == (2, 8)


def test_shards_of_two_sequences() -> None:
    batch = {
        "input_ids": torch.arange(32).view(2, 16), "decoder_input_ids": torch.arange(16).view(2, 8),
        "labels": torch.arange(16).view(2, 8),
        "padding_mask": torch.ones(2, 16), "decoder_padding_mask": torch.ones(2, 8), "samples": torch.arange(2),
    }  # fmt: skip
    shard = shard_batch(batch, axis(0, 2), Task.sequences)
    assert shard["coordinates"].tolist() == [0, 1, 2, 3, 12, 13, 14, 15] and shard["decoder_coordinates"].tolist() == [
        0,
        1,
        6,
        7,
    ]
    assert shard["labels"].tolist() == shard["decoder_input_ids"].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert shard["input_ids"][0].tolist() == shard["coordinates"].tolist()
    assert all(shard[name] is batch[name] for name in ("padding_mask", "decoder_padding_mask", "samples"))


class Gathers(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "_c10d_functional" and "wait" not in function.__name__:
            self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def drawn(kv_heads: int, queries: int = LENGTH) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, the same everywhere."""
    random = torch.Generator().manual_seed(0)
    shapes = (HEADS, queries), (kv_heads, LENGTH), (kv_heads, LENGTH), (HEADS, queries)
    return [torch.randn(BATCH, heads, length, WIDTH, generator=random, dtype=torch.float64) for heads, length in shapes]


def mask_of(form: str) -> AttentionMask:
    documents = (torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.2).cumsum(dim=1)
    rows = row_keys(
        1, torch.tensor(3), torch.tensor([10, 11]), torch.arange(QUERIES if form.startswith("cross") else LENGTH)
    )
    padding = torch.arange(LENGTH) < torch.tensor([[20], [9]])
    relative = torch.randn(HEADS, 2 * LENGTH - 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {
        "causal": AttentionMask(),
        "documents": AttentionMask(documents=documents),
        "alibi": AttentionMask(slopes=alibi_slopes(HEADS)),
        "window": AttentionMask(window=5),
        "dropout": AttentionMask(dropout_keys=rows),
        "padding": AttentionMask(causal=False, padding=padding, dropout_keys=rows),
        "causal padding": AttentionMask(padding=padding),
        "padding before the tokens": AttentionMask(padding=~padding, dropout_keys=rows),
        "relative": AttentionMask(causal=False, relative=relative, padding=padding),
        "relative dropout": AttentionMask(causal=False, relative=relative, padding=padding, dropout_keys=rows),
        "causal relative": AttentionMask(relative=relative, dropout_keys=rows),
        "cross": AttentionMask(causal=False),
        "cross dropout": AttentionMask(causal=False, padding=padding, dropout_keys=rows),
        "bidirectional": AttentionMask(causal=False),
        "all": AttentionMask(documents=documents, slopes=alibi_slopes(HEADS), window=9, dropout_keys=rows),
    }[form]


def attend(core, tensors, mask: AttentionMask) -> list[torch.Tensor]:
    """Output and gradients of q, k, v."""
    *inputs, upstream = (tensor.clone().requires_grad_() for tensor in tensors)
    output = core(*inputs, mask)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def on_a_rank(form: str, kv_heads: int, backend: str):
    """This rank's attention, the same cut out of the whole, and the names of the collectives."""
    cp_axis = Axis(init_device_mesh("cpu", (dist.get_world_size(),)))
    queries = QUERIES if form.startswith("cross") else LENGTH
    of_keys, of_queries, mask = token_positions(LENGTH, cp_axis), token_positions(queries, cp_axis), mask_of(form)
    core = CoreAttention(0.25, "layers.0.scores", backend)
    whole = drawn(kv_heads, queries)
    positions = of_queries, of_queries, of_keys, of_keys
    expected = [tensor[:, :, of] for tensor, of in zip(attend(core, whole, mask), positions, strict=True)]
    local_mask = mask
    if mask.dropout_keys is not None:
        local_mask = mask._replace(dropout_keys=mask.dropout_keys[:, of_queries])
    with Gathers() as gathers:
        positions = of_queries, of_keys, of_keys, of_queries
        inputs = [tensor[:, :, of] for tensor, of in zip(whole, positions, strict=True)]
        found = attend(ContextAttention(core, cp_axis), inputs, local_mask)
    return expected, found, gathers.names


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("form", "kv_heads", "backend"),
    [("causal", 4, "auto"), ("causal", 2, "auto"), ("causal", 4, "explicit"), ("documents", 1, "auto"),
     ("alibi", 4, "auto"),
     ("window", 2, "explicit"), ("dropout", 2, "auto"), ("padding", 2, "auto"),
     ("padding", 4, "sdpa"), ("bidirectional", 4, "auto"), ("causal padding", 4, "auto"), ("relative", 2, "auto"),
     ("padding before the tokens", 2, "auto"), ("padding before the tokens", 4, "explicit"),
     ("relative dropout", 4, "auto"), ("causal relative", 2, "explicit"), ("cross", 2, "auto"), ("cross dropout", 4,
      "auto"),
     ("all", 4, "auto"), ("all", 1, "auto")],
)  # fmt: skip
def test_attention_of_shards_is_that_of_the_whole(form: str, kv_heads: int, backend: str, size: int) -> None:
    for expected, found, names in run_ranks(on_a_rank, size, form, kv_heads, backend):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        assert names == ["all_gather_into_tensor", "reduce_scatter_tensor"]  # one each way, keys and values together


def test_positions_of_queries_are_for_causal_attention_alone(monkeypatch) -> None:
    monkeypatch.setattr("megalith.parallel.context.gather_keys_values", lambda k, v, axis: (k, v))
    attention = ContextAttention(CoreAttention(0.0, "s"), axis(0, 2))
    with pytest.raises(ConfigError, match="not causal"):
        attention(*drawn(4)[:3], AttentionMask(causal=False, slopes=alibi_slopes(HEADS)))


def pretrain(config) -> None:
    """On each rank of a pool."""
    train(config)


@pytest.mark.parametrize(
    "changes", [{}, {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}]
)
def test_a_run_has_the_numbers_of_one_process(tmp_path, changes) -> None:
    """With dropout and validation; one process resumes what two began, with their optimizer state in shards."""
    alone = tiny_config(write_corpus(str(tmp_path / "corpus")), str(tmp_path / "alone"), **changes)
    split = alone.replace(run_dir=str(tmp_path / "split"))
    run_ranks(pretrain, 1, alone)
    run_ranks(pretrain, 2, split.replace(context_parallel_size=2, use_distributed_optimizer=True, exit_interval=8))
    assert len(losses(str(tmp_path / "split"))) == 8
    run_ranks(pretrain, 1, split)
    for key in ("loss", "grad_norm", "tokens", "validation_loss"):
        one, two = ([line[key] for line in records(str(tmp_path / name)) if key in line] for name in ("alone", "split"))
        assert one and two == pytest.approx(one, rel=1e-5), key
