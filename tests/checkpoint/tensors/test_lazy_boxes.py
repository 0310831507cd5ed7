"""A box of a derived tensor is that box of all of it: every operation, and every format's splitting of fused rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalith.checkpoint.formats.huggingface.family import GROUPED_QKV, IDENTITY, QKV_TRANSPOSED, TRANSPOSED
from megalith.checkpoint.formats.megatron import layout
from megalith.checkpoint.formats.megatron.dist import _unflatten
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.config.sections.model import ModelConfig

CHANGES = {  # name: (of a Lazy, of a tensor), both of shape [a, b], and [a] where the name begins with "rows"
    "t": (lambda x: x.t(), lambda x: x.t()),
    "narrow": (lambda x: x.narrow(1, 1, x.shape[1] - 1), lambda x: x[:, 1:]),
    "rows reversed": (lambda x: x.index_select(torch.arange(x.shape[0]).flip(0)), lambda x: x.flip(0)),
    "rows, two runs": (
        lambda x: x.index_select(torch.arange(x.shape[0]).roll(x.shape[0] // 2)), lambda x: x.roll(x.shape[0] // 2, 0),
    ),
    "rows, each second": (lambda x: x.index_select(torch.arange(0, x.shape[0], 2)), lambda x: x[::2]),
    "rows chunked": (lambda x: x.chunk(2)[1], lambda x: x[: len(x) // 2 * 2].chunk(2)[1]),
    "rows flat": (lambda x: x.reshape((x.shape[0] * 2 // 2, *x.shape[1:])), lambda x: x),
    "flat": (lambda x: x.reshape((x.shape[0] * x.shape[1],)), lambda x: x.reshape(-1)),
    "turned by reshape": (lambda x: x.reshape(x.shape[::-1]), lambda x: x.reshape(x.shape[::-1])),
    "one more axis": (lambda x: x.reshape((1, *x.shape)), lambda x: x[None]),
    "one axis less": (lambda x: x.reshape((1, *x.shape)).reshape(x.shape), lambda x: x),
    "rows to bfloat16": (lambda x: x.to(torch.bfloat16), lambda x: x.to(torch.bfloat16)),
    "rows minus one": (lambda x: x.elementwise(lambda part: part - 1), lambda x: x - 1),
    "rows twice": (lambda x: cat([x, x]), lambda x: torch.cat([x, x])),
    "columns twice": (lambda x: cat([x, x], 1), lambda x: torch.cat([x, x], 1)),
    "all": (
        lambda x: cat([x.t(), x.t().index_select(torch.arange(x.shape[1]).flip(0))], 1).to(torch.float64),
        lambda x: torch.cat([x.t(), x.t().flip(0)], 1).double(),
    ),
}  # fmt: skip


@st.composite
def boxes(draw, shape: tuple[int, ...]):
    """A box of a tensor, possibly empty, possibly without its last axes."""
    axes = draw(st.integers(0, len(shape)))
    bounds = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape[:axes]]
    return tuple(slice(first, last) for first, last in bounds)


def source(whole: Tensor, limits: list) -> Lazy:
    """A tensor that notes how many elements each reading takes."""

    def part(index=()):
        limits.append(whole[index].numel())
        return whole[index]

    return Lazy(shape=tuple(whole.shape), dtype=whole.dtype, read=part, box=part)


def equal(lazy: Lazy, whole: Tensor, index) -> bool:
    found, wanted = lazy.part(index), whole[index]
    return found.shape == wanted.shape and found.dtype == wanted.dtype and torch.equal(found, wanted)


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_box_of_a_changed_tensor(data) -> None:
    name = data.draw(st.sampled_from(sorted(CHANGES)))
    axes = data.draw(st.integers(1 if name.startswith("rows") else 2, 2))
    whole = torch.randn(data.draw(st.integers(2, 40)), data.draw(st.integers(2, 9)))
    whole = whole if axes == 2 else whole[:, 0].contiguous()
    of_lazy, of_tensor = CHANGES[name]
    wanted = of_tensor(whole)
    for each in (source(whole, []), Lazy(shape=tuple(whole.shape), dtype=whole.dtype, read=lambda: whole)):
        made = of_lazy(each)
        assert made.shape == wanted.shape and made.dtype == wanted.dtype and equal(made, wanted, ())
        assert equal(made, wanted, data.draw(boxes(wanted.shape)))


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_box_of_a_hugging_face_form(data) -> None:
    groups, share, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    model = ModelConfig(
        hidden_size=6,
        num_attention_heads=groups * share,
        num_query_groups=groups,
        group_query_attention=True,
        kv_channels=width,
    )
    ours = [torch.randn(rows, 6) for rows in (groups * share * width, groups * width, groups * width)]
    conversion = data.draw(st.sampled_from([IDENTITY, TRANSPOSED, GROUPED_QKV, QKV_TRANSPOSED]))
    ours = ours[:1] if conversion in (IDENTITY, TRANSPOSED) else [ours[1]] * 3 if conversion is QKV_TRANSPOSED else ours
    theirs = conversion.to_hf([Lazy.of(each) for each in ours], model)
    whole = theirs.read()
    assert equal(theirs, whole, data.draw(boxes(whole.shape)))
    for each, part in zip(ours, conversion.from_hf(source(whole, []), model), strict=True):
        assert equal(part, each, ()) and equal(part, each, data.draw(boxes(each.shape)))


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_box_of_what_megatrons_ranks_hold(data) -> None:
    split = data.draw(st.sampled_from(["replicated", "rows", "columns", "vocabulary", "halves", "qkv", "pair"]))
    ranks, share, width = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    groups = 2
    how = layout.Layout(
        heads=groups * share, groups=groups, head_dim=width, vocabulary=7, padded=8, ranks=ranks,
        gate_first=data.draw(st.booleans()),
        qkv=data.draw(st.sampled_from(["grouped", "thirds"] if share > 1 else ["grouped", "thirds", "interleaved"])),
    )  # fmt: skip
    rows = {
        "qkv": [groups * share * width, *[groups * width] * 2],
        "pair": [groups * width] * 2,
        "vocabulary": [7],
        "halves": [4, 4],
    }
    ours = [torch.randn(size, 6) for size in rows.get(split, [4])]
    lazies = [Lazy.of(each) for each in ours]
    if how.qkv == "grouped" or split not in ("qkv", "pair"):
        parts = [layout.take_shard(split, lazies, how, rank) for rank in range(ranks)]
    else:  # which is only read
        kinds = [part.chunk(ranks) for part in ours]
        parts = [torch.cat([kind[rank] for kind in kinds]) for rank in range(ranks)]
        if how.qkv == "interleaved":
            parts = [torch.stack([kind[rank] for kind in kinds], dim=1).flatten(0, 1) for rank in range(ranks)]
    for each, part in zip(
        ours, layout.merge_shards(split, [source(part, []) for part in parts], how, len(ours)), strict=True
    ):
        assert equal(part, each, ()) and equal(part, each, data.draw(boxes(each.shape)))


@pytest.mark.parametrize("fragments", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_box_of_what_cores_optimizer_stores_flat(fragments) -> None:
    whole = torch.arange(4.0 * 6).view(4, 6)
    flat = torch.stack(
        [torch.stack([part.flatten() for part in rows.chunk(fragments[1], 1)]) for rows in whole.chunk(fragments[0])]
    )
    made = _unflatten(source(flat, []), (4, 6))
    assert all(
        equal(made, whole, index)
        for index in ((), (slice(1, 3),), (slice(0, 4), slice(2, 5)), (slice(3, 4), slice(0, 1)))
    )


def test_no_more_is_read_than_the_box() -> None:
    """A rank of two reads half of what it needs half of, whatever operations are between file and parameter.

    The interleaved order takes a head more.
    """
    taken: list[int] = []
    whole = source(torch.randn(48, 16), taken)
    model = ModelConfig(hidden_size=16, num_attention_heads=4, kv_channels=4)
    how = layout.Layout(heads=4, groups=4, head_dim=4, vocabulary=48, padded=48, ranks=1)
    for lazy in (
        *GROUPED_QKV.from_hf(whole, model),
        *layout.merge_shards("qkv", [whole], how, 3),
        *layout.merge_shards("halves", [whole], how, 2),
    ):
        for index in ((slice(0, lazy.shape[0] // 2),), (slice(0, lazy.shape[0]), slice(8, 16))):
            taken.clear()
            assert lazy.part(index).numel() == lazy.part(index).numel() and sum(taken) / 2 <= 3 * lazy.shape[0] * 16 / 2
    taken.clear()
    assert (
        QKV_TRANSPOSED.from_hf(source(torch.randn(16, 48), taken), model)[1].part((slice(0, 8),)).numel()
        == sum(taken)
        == 8 * 16
    )
    taken.clear()
    assert cat([whole, whole], 1).part((slice(4, 8), slice(12, 20))).numel() == sum(taken) == 4 * 8
