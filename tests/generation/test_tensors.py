"""The tensor form against `complete`: padding on either side, widths, options of megatron_generate, wrong tensors."""

import re

import pytest
import torch

from megalith.common.errors import ConfigError, DataError
from megalith.generation.engine import Engine
from megalith.generation.generate import complete
from megalith.generation.model import TextModel
from megalith.generation.tensors import generate_tokens

PROMPTS = [[5, 17, 3, 60, 2], [9], [44, 44, 8]]


def padded(prompts: list[list[int]], left: bool, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [b, s], int64."""
    width = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        filling, ones = [pad] * (width - len(prompt)), [1] * len(prompt)
        zeros = [0] * len(filling)
        rows.append(filling + prompt if left else prompt + filling)
        masks.append(zeros + ones if left else ones + zeros)
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize("pad", [0, 299])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"top_p": 0.8, "top_p_decay": 0.5, "temperature": 0.9},
            {"top_p": 0.8, "top_p_decay": 0.5, "temperature": 0.9},
        ),
        ({"top_k": 50, "temperature": 0.9, "random_seed": 7}, {"top_k": 50, "temperature": 0.9, "seed": 7}),
        ({"add_BOS": True, "top_k": 1}, {"add_bos": True, "greedy": True}),
        (
            {"stop_token": 100, "temperature": 20.0},
            {"stop_token_ids": [100], "stop_at_eod": False, "temperature": 20.0},
        ),
    ],
    ids=str,
)
def test_rows_are_prompts_new_tokens_and_padding(theirs: dict, ours: dict, left: bool, pad: int, make) -> None:
    model = make(torch.float64)
    tokens = generate_tokens(model, *padded(PROMPTS, left, pad), max_new_tokens=30, **theirs)
    expected = complete(model, PROMPTS, max_new_tokens=30, **{"seed": 0} | ours)
    assert tokens.dtype == torch.int64 and tokens.shape == (
        3,
        max(len(one.prompt_ids) + len(one.ids) for one in expected),
    )
    for row, one in zip(tokens.tolist(), expected):
        ids = one.prompt_ids + one.ids
        assert row == ids + [model.tokenizer.eod] * (len(row) - len(ids))


def test_a_stop_token_replaces_the_end_of_document(make) -> None:
    model, options = make(torch.float64), {"max_new_tokens": 60, "temperature": 20.0}
    for seed in range(20):  # until a text has an end-of-document token that does not end it
        tokens = generate_tokens(model, torch.tensor([[5, 6]]), stop_token=100, random_seed=seed, **options)
        (made,) = complete(model, [[5, 6]], stop_token_ids=100, stop_at_eod=False, seed=seed, **options)
        assert tokens.tolist() == [[5, 6, *made.ids]]
        if model.tokenizer.eod in made.ids[:-1]:
            return
    raise AssertionError("no text has an end-of-document token")


def test_beams_are_the_best_of_each_prompt(make) -> None:
    model = make(torch.float64)
    options = {"length_penalty": 1.5, "max_new_tokens": 6}
    tokens = generate_tokens(model, *padded(PROMPTS, False, 0), num_beams=5, **options)
    for row, one in zip(tokens.tolist(), complete(model, PROMPTS, beam_width=5, num_samples=5, **options)[::5]):
        assert row[: len(one.prompt_ids) + len(one.ids)] == one.prompt_ids + one.ids


def test_lengths_and_models(make, tokenizer) -> None:
    model, (ids, mask) = make(torch.float64), padded(PROMPTS, False, 0)
    assert torch.equal(
        generate_tokens(model, ids, mask, max_length=9, stop_token=299),
        generate_tokens(model, ids, mask, max_new_tokens=4, max_length=100, stop_token=299),
    )
    whole = generate_tokens(model, ids, max_new_tokens=4, stop_token=299)  # without a mask all tokens are the prompt's
    assert whole.shape == (3, 9) and torch.equal(whole[:, :5], ids)
    assert torch.equal(whole, generate_tokens(Engine(model, max_length=20), ids, max_new_tokens=4, stop_token=299))
    empty = generate_tokens(model, ids[:1], torch.zeros(1, 5), max_new_tokens=1)
    assert empty[0, 0] == tokenizer.eod and empty.shape == (1, 2)
    assert generate_tokens(model, ids[:0], max_new_tokens=4).shape[0] == 0
    fresh = [generate_tokens(model, ids, mask, max_new_tokens=20, random_seed=None) for _ in range(2)]
    assert fresh[0].shape != fresh[1].shape or not torch.equal(*fresh)
    model.tokenizer = None
    rows = generate_tokens(model, ids, mask, max_new_tokens=30, stop_token=7, temperature=20.0).tolist()
    assert all(7 not in row[5 : row.index(7, 5)] and set(row[row.index(7, 5) :]) == {7} for row in rows if 7 in row[5:])


IDS = torch.tensor([[1, 2, 3]])
WRONG = {
    "max_new_tokens or max_length must be given; found neither": {},
    "max_length must be at least the width of input_ids, 3; found 2": {"max_length": 2},
    "input_ids must be whole numbers [b, s]; found torch.int64 [3]": {"input_ids": IDS[0], "max_new_tokens": 1},
    "input_ids must be whole numbers [b, s]; found torch.float32 [1, 3]": {"input_ids": IDS.float(), "max_length": 9},
    "attention_mask must have the shape of input_ids, [1, 3]; found [1, 2]": {"attention_mask": IDS[:, :2]},
    "zeros at one end of a row, where padding is; found [1, 0, 1] in row 0": {"attention_mask": IDS % 2},
    "zeros at one end of a row, where padding is; found [0, 1, 0] in row 0": {"attention_mask": 1 - IDS % 2},
    "--temperature must be at least 0; found -1": {"temperature": -1},
    "--beam-width must be at least 1; found 0": {"num_beams": 0},
    "--stop-token-ids must be a list of token numbers; found 'x'": {"stop_token": "x"},
    "--add-bos must be true or false; found 1": {"add_BOS": 1},
    "the prompt has 3 tokens and 198 new ones are asked for, together 201": {"max_new_tokens": 198},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told(message: str, make) -> None:
    given = {"input_ids": IDS, **({"max_new_tokens": 2} if "mask" in str(WRONG[message]) else {}), **WRONG[message]}
    if message.startswith("--"):
        given["max_new_tokens"] = 2
    with pytest.raises(ConfigError, match=re.escape(message)):
        generate_tokens(make(), **given)


def test_an_encoder_decoder_answers(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows begin with the decoder's start; two stop tokens, and another token for padding."""
    monkeypatch.setattr(TextModel, "decoder_start", 5)
    model, stops = make(torch.float64, model_type="t5", decoder_num_layers=2), [100, 200]
    tokens = generate_tokens(
        model, *padded(PROMPTS, True, 0), max_length=31, temperature=20.0, stop_token=stops, pad_token=299
    )
    made = complete(
        model, PROMPTS, max_new_tokens=30, temperature=20.0, seed=0, stop_token_ids=stops, stop_at_eod=False
    )
    for row, one in zip(tokens.tolist(), made):
        assert row == [5, *one.ids] + [299] * (len(row) - 1 - len(one.ids))


def test_bos_token_goes_before_prompts_and_is_an_empty_one(make) -> None:
    model, (ids, mask) = make(torch.float64), padded([[5, 17], []], False, 0)
    both, empty = (
        generate_tokens(model, ids, mask, max_new_tokens=3, top_k=1, bos_token=9, add_BOS=add).tolist()
        for add in (True, False)
    )
    assert both[0][:3] == [9, 5, 17] and empty[0][:2] == [5, 17]
    assert both[1][:4] == empty[1][:4] and both[1][0] == 9


def test_models_that_cannot_are_told(make) -> None:
    with pytest.raises(DataError, match="found 300"):
        generate_tokens(make(), IDS * 100, max_new_tokens=2)
    model = make()
    model.tokenizer = None
    with pytest.raises(ConfigError, match="stop_token must be given for a model without a tokenizer"):
        generate_tokens(model, IDS, max_new_tokens=2)
