"""Would the parity tests notice? Plan entries, collectives and counts are broken on purpose; each must be caught."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from megalith.parallel import collectives, context, mappings, matmul, styles, vocabulary
from megalith.parallel.pipeline import deferred as pipeline_deferred
from megalith.parallel.plans.bert import PLAN as BERT
from megalith.parallel.plans.gpt import PLAN
from megalith.parallel.plans.t5 import PLAN as T5
from megalith.testing import run_ranks
from megalith.testing.parity import TOLERANCE, LayoutResult, compare, measure
from megalith.training import forward_backward
from tests.parity.cases import LAYOUTS, PIPELINES, config_of

DTYPE = torch.float64


def entry(pattern: str, style: Callable) -> contextlib.AbstractContextManager:
    """The plan with another style for a pattern."""
    return mock.patch.dict(PLAN, {pattern: style})


def bert_entry(pattern: str, style: Callable) -> contextlib.AbstractContextManager:
    """The plan of BERT with another style for a pattern."""
    return mock.patch.dict(BERT, {pattern: style})


def t5_entry(pattern: str, style: Callable) -> contextlib.AbstractContextManager:
    """The plan of T5 with another style for a pattern."""
    return mock.patch.dict(T5, {pattern: style})


def order_everywhere(logits: Tensor, order: Tensor, weights: Tensor, coordinates: Tensor) -> Tensor:
    """A loss of the order wherever some token is the first."""
    return torch.nn.functional.cross_entropy(logits, order, reduction="none") * weights


def in_context(name: str, wrong: Callable) -> contextlib.AbstractContextManager:
    """Context parallelism with another function of that name."""
    return mock.patch.object(context, name, wrong)


def shuffled_padding(batch, axis, sequences):
    """A padding mask in the order of the processes that it was gathered from, not that of the sequence."""
    shard = shard_batch(batch, axis, sequences)
    return shard | {"padding_mask": shard["padding_mask"][:, order_of_processes(batch["input_ids"].shape[1], axis)]}


def order_of_processes(length: int, axis) -> Tensor:
    """The positions of all processes' tokens, concatenated without sorting."""
    axes = [mock.Mock(rank=rank, size=axis.size) for rank in range(axis.size)]
    return torch.cat([context.token_positions(length, each) for each in axes])


def shuffled_keys(k, v, axis):
    """Keys and values in the order of the processes that they were gathered from."""
    order = order_of_processes(k.shape[2] * axis.size, axis)
    return tuple(x.index_select(2, order) for x in gather_keys_values(k, v, axis))


def one_sequence(batch, axis, sequences):
    """The decoder's positions forgotten, so that each process takes its tokens for the first ones."""
    return {name: value for name, value in shard_batch(batch, axis, sequences).items() if name != "decoder_coordinates"}


def unchanged(module, parent, axis):
    """A style that changes nothing."""
    return module


def unsummed(style: Callable) -> Callable:
    """A style whose gradients are not summed."""

    def build(module, parent, axis):
        replacement = style(module, parent, axis)
        replacement.partial_gradients = ()
        return replacement

    return build


def dropout_of_first_shard(module, parent, axis):
    """Dropout by the dropout keys of the first rank on all ranks."""
    replacement = styles.sequence_parallel_dropout(module, parent, axis)
    replacement.axis = mock.Mock(sequence_shard=lambda keys: keys[:, : keys.shape[1] // axis.size])
    return replacement


def identity_sum(x: Tensor, group: str) -> Tensor:
    """A sum over the ranks that is forgotten."""
    return collectives.ops.all_reduce(x / 2, "sum", group)  # the mean, so that ranks stay in step


def flipped_gather(started: Tensor, size: int) -> Tensor:
    """A gather that mixes up the ranks."""
    shards = collectives.wait(started)
    return shards.view(size, -1, *shards.shape[1:]).flip(0).transpose(0, 1).flatten(1, 2)


def local_count(runtime, task, batches):
    """Each rank divides by the tokens it has seen itself."""
    return {"lm loss": torch.stack([data["loss_mask"].sum() for data in batches]).sum() * runtime.mesh.data_size}


shard_batch, gather_keys_values = context.shard_batch, context.gather_keys_values
MUTATIONS: dict[str, tuple[str, str, Callable[[], contextlib.AbstractContextManager]]] = {
    "slopes of other heads": ("alibi", "tp2", lambda: entry("layers.*.attention.core", unchanged)),
    "score dropout of other heads": ("dropout", "tp2", lambda: entry("layers.*.attention.core", unchanged)),
    "norm not summed": ("absolute", "tp2 sp", lambda: entry("layers.*.mlp_norm", unsummed(styles.replicated_norm))),
    "final norm not summed": ("absolute", "tp2 sp", lambda: entry("final_norm", unsummed(styles.replicated_norm))),
    "head norm not summed": ("rotary", "tp2", lambda: entry("layers.*.attention.k_norm", styles.replicated_norm)),
    "head's norm not summed": ("bert", "tp2 sp", lambda: bert_entry("head_norm", unsummed(styles.replicated_norm))),
    "head's layer not summed": ("bert", "tp2 sp", lambda: bert_entry("head_dense", styles.replicated_linear)),
    "pooler summed": ("bert", "tp2 sp", lambda: bert_entry("pooler", styles.sequence_parallel_linear)),
    "head's bias not summed": ("bert", "tp2", lambda: bert_entry("head", unsummed(styles.lm_head))),
    "first token of each part": ("bert", "tp2 sp", lambda: bert_entry("first_token", unchanged)),
    "memory's gradient not summed": ("t5", "tp2", lambda: t5_entry("memory", unchanged)),
    "memory gathered in each layer too": (
        "t5",
        "tp2 sp",
        lambda: t5_entry("layers.*.cross_attention.memory_input", styles.shared_input),
    ),
    "norm of queries to the memory not summed": (
        "t5",
        "tp2 sp",
        lambda: t5_entry("layers.*.cross_norm", unsummed(styles.replicated_norm)),
    ),
    "encoder's norm not summed": (
        "t5 relative",
        "tp2 sp",
        lambda: t5_entry("encoder_norm", unsummed(styles.replicated_norm)),
    ),
    "cross scores dropped as other heads'": (
        "t5 dropout",
        "tp2",
        lambda: t5_entry("layers.*.cross_attention.core", unchanged),
    ),
    "cross dropout of other rows": (
        "t5 dropout",
        "tp2 sp",
        lambda: t5_entry("layers.*.cross_dropout", dropout_of_first_shard),
    ),
    "order counted by each part": (
        "bert",
        "cp2",
        lambda: mock.patch("megalith.models.bert.sequence_loss", order_everywhere),
    ),
    "padding in the order of processes": ("t5", "cp2", lambda: in_context("shard_batch", shuffled_padding)),
    "padding not gathered": ("t5", "cp2", lambda: in_context("UNSHARDED", ())),
    "decoder's positions in a shard": ("t5", "cp2", lambda: in_context("shard_batch", one_sequence)),
    "decoder's dropout of other rows": ("t5 dropout", "cp2", lambda: in_context("shard_batch", one_sequence)),
    "bias of a part's distances": ("t5 relative", "cp2", lambda: in_context("BIASES", ())),
    "bias as if the queries were the last": (
        "t5 relative",
        "cp2",
        lambda: in_context("shift_relative_bias", lambda table, end, length: table),
    ),
    "keys in the order of processes": ("t5", "cp2", lambda: in_context("gather_keys_values", shuffled_keys)),
    "keys not summed": ("alibi", "tp2", lambda: entry("layers.*.attention.k", unsummed(styles.heads))),
    "row bias not summed": ("absolute", "tp2 sp", lambda: entry("layers.*.mlp.down", unsummed(styles.row))),
    "positions not summed": (
        "absolute",
        "tp2 sp",
        lambda: entry("position_embedding", unsummed(styles.sequence_parallel_embedding)),
    ),
    "embedding dropout of other rows": (
        "dropout",
        "tp2 sp",
        lambda: entry("embedding_dropout", dropout_of_first_shard),
    ),
    "MLP dropout of other rows": ("dropout", "tp2 sp", lambda: entry("layers.*.mlp_dropout", dropout_of_first_shard)),
    "attention dropout of all rows": ("dropout", "tp2 sp", lambda: entry("layers.*.attention_dropout", unchanged)),
    "loss of a part of the vocabulary": ("absolute", "tp2", lambda: entry("token_loss", unchanged)),
    "up as a copy": ("absolute", "tp2", lambda: entry("layers.*.mlp.up", styles.row)),
    "sums out of regions": ("absolute", "tp2", lambda: mock.patch.object(mappings, "start_all_reduce", identity_sum)),
    "inputs' gradients not summed": (
        "absolute",
        "tp2",
        lambda: mock.patch.object(matmul, "start_all_reduce", identity_sum),
    ),
    "sum of the softmax": ("absolute", "tp2", lambda: mock.patch.object(vocabulary, "start_all_reduce", identity_sum)),
    "gathered in another order": (
        "absolute",
        "tp2 sp",
        lambda: mock.patch.object(matmul, "finish_all_gather", flipped_gather),
    ),
    "gradients gathered in another order": (
        "absolute",
        "tp2 sp",
        lambda: mock.patch.object(mappings, "finish_all_gather", flipped_gather),
    ),
    "no sum over copies": (
        "rotary",
        "tp2 sp",
        lambda: mock.patch("megalith.parallel.stage_module.sum_partial_gradients", lambda model: None),
    ),
    "replicas not summed": (
        "absolute",
        "dp2 none",
        lambda: mock.patch("megalith.parallel.data_parallel.Replicas.finish", lambda self: None),
    ),
    "shards averaged": (
        "absolute",
        "dp2 full",
        lambda: mock.patch("torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor"),
    ),
    "copies not summed over stages": (
        "absolute",
        "pp2",
        lambda: mock.patch("megalith.parallel.pipeline.shared.SharedParameters.sum_gradients", lambda self: None),
    ),
    "copies not summed on one process": (
        "absolute",
        "zbv",
        lambda: mock.patch("megalith.parallel.pipeline.shared.SharedParameters.sum_gradients", lambda self: None),
    ),
    "deferred weight gradients lost": (
        "rotary",
        "zbv",
        lambda: mock.patch.object(pipeline_deferred, "run", lambda work: None),
    ),
    "normalised by own tokens": (
        "absolute",
        "dp2 none",
        lambda: mock.patch.object(forward_backward, "global_counts", local_count),
    ),
}


def broken(name: str) -> LayoutResult:
    """One step with a mutation."""
    form, layout, patch = MUTATIONS[name]
    with patch():
        return measure(config_of(form, layout), DTYPE)


@functools.cache
def on_one_process(form: str, deep: bool) -> LayoutResult:
    """One process, unbroken."""
    return run_ranks(measure, 1, config_of(form, deep=deep), DTYPE)[0]


@pytest.mark.parametrize("name", MUTATIONS)
def test_break_is_caught(name: str) -> None:
    form, layout, _ = MUTATIONS[name]
    try:
        parts = run_ranks(broken, LAYOUTS[layout][0], name, timeout=60)
    except (RuntimeError, IndexError, ValueError):  # shapes that do not fit: noticed without any comparison
        return
    expected = on_one_process(form, layout in PIPELINES)
    elsewhere = [
        {name: value for name, value in expected.gradients.items() if name not in part.weights} for part in parts
    ]
    whole = [
        dataclasses.replace(part, gradients=other | part.gradients)
        for part, other in zip(parts, elsewhere, strict=True)
    ]
    worst = max(difference.error for part in whole for difference in compare(expected, part, DTYPE))
    assert worst > 100 * TOLERANCE[DTYPE], f"{name} went unnoticed: worst difference {worst}"
