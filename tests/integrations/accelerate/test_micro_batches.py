"""Batches that are refused; micro-batches and the outputs that are made of them."""

import types
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalith.common.errors import ConfigError
from megalith.config.run import RunConfig
from megalith.config.sections.parallel import ParallelConfig
from megalith.integrations.accelerate.batches import cut, keep_padding_idx, outputs, sequence_unit, split, to_batch
from megalith.runtime.load import load_runtime
from megalith.testing import run_ranks
from megalith.testing.parity import full_tensor
from tests.integrations.accelerate.placed import LENGTH, PADDED, TOLERANCE, Placed, drawn, masked_lm
from tests.originals.families import BERTS, HEADED, MODELS, t5

GPT2 = types.SimpleNamespace(
    config=RunConfig().replace(max_position_embeddings=32), hf_config=transformers.GPT2Config(n_positions=32)
)
IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"label": IDS}, "A key of the batch must be one of .*; found 'label'. Write labels, or take it out"),
        ({"special_tokens": IDS}, "found 'special_tokens'. Take it out of the batch"),
        ({"labels": [1, 2]}, "labels of the batch must be a tensor; found list. Convert it in the collate function"),
        ({"labels": IDS[:, 1:]}, r"labels must be \[2, 5\], as input_ids; found \[2, 4\]"),
        ({"labels": IDS - 2}, "labels must be ids of tokens, or -100 where there is no loss; found -1"),
        ({"labels": IDS * 1.0}, r"labels must be integers; found torch.float32"),
        ({"attention_mask": torch.ones(2, 5, 5)}, r"found \[2, 5, 5\]. .*masks of queries x keys are not taken"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, "masks of queries x keys are not taken"),
        ({"position_ids": IDS[:, 1:]}, r"position_ids must be \[2, 5\]"),
        ({"token_type_ids": IDS * 0}, "token_type_ids is not there in this model; found gpt2"),
        ({"num_items_in_batch": torch.tensor(3)}, r"num_items_in_batch=...\) is not taken, as the loss of a call"),
        ({"inputs_embeds": torch.ones(2, 5, 8)}, "hidden states do not leave their layout"),
        ({"output_attentions": True}, r"output_attentions=...\) must be False here; found True"),
        ({"input_ids": torch.ones(2, 33, dtype=torch.long)}, "length of input_ids must be at most 32"),
        ({"input_ids": IDS[0]}, r"input_ids must be there, \[samples, tokens\]"),
        ({"input_ids": None, "labels": IDS}, "input_ids must be there"),
    ],
)
def test_what_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_batch("gpt", {"input_ids": IDS, **more}, GPT2)


def test_what_says_nothing_is_taken() -> None:
    options = {"use_cache": False, "return_dict": True, "output_hidden_states": None, "logits_to_keep": 0}
    batch = to_batch("gpt", {"input_ids": IDS.int(), "labels": None, **options}, GPT2)
    assert list(batch) == ["input_ids"] and batch["input_ids"].dtype == torch.int64
    llama = types.SimpleNamespace(config=GPT2.config, hf_config=transformers.LlamaConfig())
    assert list(to_batch("gpt", {"input_ids": IDS, "token_type_ids": IDS * 0}, llama)) == ["input_ids"]
    with pytest.raises(ConfigError, match="token_type_ids is not there in this model; found llama"):
        to_batch("gpt", {"input_ids": IDS, "token_type_ids": IDS}, llama)


@given(st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(1, 4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_split_keeps_every_sample_once(rows: int, number: int, orders: bool, tp: int, bidirectional: bool) -> None:
    """Equal shapes, the samples in their order, then copies that do not count; sequences of a length that splits."""
    ids = torch.arange(rows * 10).view(rows, 10) + 1
    batch = {"input_ids": ids, "labels": ids, "loss_mask": torch.ones(rows, 10), "samples": torch.arange(rows)}
    if orders:
        batch["sentence_order"] = torch.arange(rows) % 2
    kind = "bert" if bidirectional else "gpt"
    config = RunConfig().replace(
        model_type=kind, tensor_model_parallel_size=tp, sequence_parallel=tp > 1, max_position_embeddings=12
    )
    parts = split(batch, number, config)
    assert len(parts) == number
    shapes = [{name: tensor.shape for name, tensor in part.items()} for part in parts]
    assert all(shape == shapes[0] for shape in shapes) and len(parts[0]["input_ids"]) == -(-rows // number)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    length = whole["input_ids"].shape[1]
    assert length % tp == 0 and length < 10 + tp
    for name, tensor in batch.items():
        assert torch.equal(whole[name][:rows, :10] if tensor.dim() > 1 else whole[name][:rows], tensor)
    assert whole["loss_mask"].sum() == rows * 10 and not whole["loss_mask"][:, 10:].any()
    assert not orders or len(whole["input_ids"]) == rows or whole["order_mask"].sum() == rows
    assert ("padding_mask" in whole) == (bidirectional and length > 10)
    if "padding_mask" in whole:
        assert whole["padding_mask"].sum() == len(whole["input_ids"]) * 10
    logits = torch.randn(len(whole["input_ids"]), length, 2)
    found = cut((logits, logits[:, 0]), batch)
    assert torch.equal(found[0], logits[:rows, :10]) and torch.equal(found[1], logits[:rows, 0])


def test_units_of_sequences() -> None:
    def unit(**parallel: Any) -> int:
        return sequence_unit(RunConfig(parallel=ParallelConfig(**parallel)))

    assert unit() == unit(tensor_model_parallel_size=4) == 1
    assert unit(tensor_model_parallel_size=4, sequence_parallel=True) == unit(context_parallel_size=2) == 4
    assert unit(tensor_model_parallel_size=3, sequence_parallel=True, context_parallel_size=2) == 12
    batch = {"input_ids": torch.ones(1, 31, dtype=torch.long)}
    config = RunConfig().replace(
        max_position_embeddings=31, tensor_model_parallel_size=2, sequence_parallel=True, num_attention_heads=2
    )
    with pytest.raises(ConfigError, match=r"must be at most 31, .* a multiple of 2 .*; found 31. .*to 30 tokens"):
        split(batch, 1, config)


KINDS = {
    "gpt2": ("gpt", MODELS["gpt2"], {}),
    "llama": ("gpt", MODELS["llama"], {}),
    "bert": ("bert", BERTS["bert"], {"next_sentence_label": torch.tensor([0, 1, 1])}),
    "megatron-bert": ("bert", BERTS["megatron-bert"], {"next_sentence_label": torch.tensor([0, 1, 1])}),
    "masked lm": ("bert", masked_lm("Bert"), {}),
    "classes": ("bert_classification", HEADED["bert classes"], {"labels": torch.tensor([0, 1, 2])}),
    "t5": ("t5", t5(), {"labels": drawn("right", seed=2)["labels"][:, :7]}),
}


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_have_the_loss_of_the_whole_and_outputs_its_class(name: str) -> None:
    """Three samples in two micro-batches, 17 tokens in a layout that splits 20, 7 of a decoder in one that splits 8."""
    kind, make_model, more = KINDS[name]
    placed = Placed(kind, make_model)
    given = drawn("right") | more
    batch = placed.batch(given)
    layout = placed.config.replace(tensor_model_parallel_size=4, sequence_parallel=True)
    parts = split(batch, 2, layout)
    assert [part["input_ids"].shape for part in parts] == [(2, 20)] * 2
    theirs = placed.original(**given)
    loss = placed.loss(parts)
    assert abs(loss - theirs.loss) < TOLERANCE
    arguments = [placed.task.inputs(part, placed.task.counts(part)) for part in parts]
    for each in arguments:
        for unwanted in ("labels", "loss_weights", "sentence_order", "order_weights"):
            each.pop(unwanted, None)
    found = [placed.model(**each) for each in arguments]
    logits = cut(
        [torch.cat(each) for each in zip(*(out if isinstance(out, tuple) else (out,) for out in found))], batch
    )
    made = outputs(placed, loss, logits)
    assert type(made) is type(theirs) and made.loss is loss
    wanted = [theirs.prediction_logits, theirs.seq_relationship_logits] if len(logits) == 2 else [theirs.logits]
    for mine, each in zip(logits, wanted, strict=True):
        seen = given["attention_mask"].bool() if mine.shape[:2] == (3, LENGTH) else slice(None)
        assert mine.shape == each.shape and (mine - each)[seen].abs().max() < TOLERANCE
    assert [each is mine for each, mine in zip(outputs(placed, loss, logits, False), (loss, *logits))] == [True] * (
        1 + len(logits)
    )
    alone = outputs(placed, None, logits)
    assert alone.loss is None and type(alone) is type(theirs) and outputs(placed, loss, None, False) == (loss,)


def gradient_of_padding(layout: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ours on each rank of a layout, and transformers'."""
    placed = Placed("gpt", PADDED["llama, padding"])
    runtime, _ = load_runtime(placed.original, ParallelConfig(device="cpu", **layout))
    keep_padding_idx(runtime, placed.original)
    given = drawn("left", 3)
    batch = placed.batch(given)
    counts = placed.task.counts(batch)
    runtime.run([placed.task.inputs(batch, counts)], lambda output, number: output.sum(), True)
    runtime.finish_gradients()
    placed.original(**given).loss.backward()
    return full_tensor(runtime.model.embedding.weight.grad), placed.original.get_input_embeddings().weight.grad


def test_the_embedding_of_padding_in_a_split_vocabulary() -> None:
    """Transformers gives it no gradient, though padding before a text predicts the text's first token."""
    for found, expected in run_ranks(gradient_of_padding, 2, {"tensor_model_parallel_size": 2}):
        assert not expected[3].any() and expected[4:].any()
        assert (found - expected).abs().max() < TOLERANCE
