"""megatron_generate against transformers' generate, in layouts; its options, and what it refuses."""

import pathlib
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import megalith
from megalith.common.errors import ConfigError, DataError
from megalith.generation.generate import complete
from megalith.integrations.accelerate.generate import megatron_generate
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import accelerating, toy_model
from tests.integrations.accelerate.prepared import prepare, processes

PROMPTS = [[5, 17, 3, 60, 9, 9, 31], [9, 70, 23], [44, 44, 8, 20, 35]]
NEW = 10
CLEAR = {  # weights so large that the likeliest token is clear
    "gpt2": {"initializer_range": 0.3},
    "llama": {"initializer_range": 0.3},
    "t5": {"initializer_factor": 2.0},
}  # fmt: skip


def clear_model(kind: str, **config: Any) -> transformers.PreTrainedModel:
    return toy_model(kind, **CLEAR[kind], **config)


def padded(prompts: list[list[int]], left: bool, pad: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [b, s]."""
    width = max(map(len, prompts), default=1)
    rows, masks = [], []
    for prompt in prompts:
        filling = [pad] * (width - len(prompt))
        rows.append(filling + prompt if left else prompt + filling)
        masks.append([0] * len(filling) + [1] * len(prompt) if left else [1] * len(prompt) + [0] * len(filling))
    shape = len(prompts), width
    return torch.tensor(rows, dtype=torch.int64).view(shape), torch.tensor(masks, dtype=torch.int64).view(shape)


def share(prompts: list[list[int]], rank: int, size: int) -> list[list[int]]:
    """Replicas have other numbers of prompts: all of them but one to the first."""
    return prompts if size == 1 else prompts[1:] if rank == 0 else prompts[:1]


def generated(kind: str, layout: str, calls: list[tuple[bool, dict[str, Any]]]) -> list[tuple[int, list[list[int]]]]:
    """This process's data-parallel rank, and rows, for each (left-padded?, options)."""
    with accelerating():
        session = prepare(clear_model(kind), layout, None)
        mesh, found = session.runtime.mesh, []
        session.runtime.train()
        for left, options in calls:
            prompts = share(PROMPTS, mesh.data_rank, mesh.data_size)
            rows = megatron_generate(session, *padded(prompts, left), max_new_tokens=NEW, **options)
            found.append((mesh.data_rank, rows.tolist()))
        assert all(module.training for stage in session.runtime.stages for module in stage.model.modules())
    return found


def expected(kind: str, **options: Any) -> list[list[int]]:
    """What transformers generates for each prompt by itself."""
    model, found = clear_model(kind).eval(), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist())
    return found


def stripped(row: list[int], pad: int = 0) -> list[int]:
    """A row without padding at its end; a stop token that is the padding too is cut off on both sides."""
    while row and row[-1] == pad:
        row = row[:-1]
    return row


FAST = {("gpt2", "dp2 sharded"), ("llama", "tp2"), ("t5", "one")}
LAYOUTS = ("one", "tp2", "pp2", "dp2", "dp2 sharded", "tp2 pp2", "virtual")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(kind, layout, marks=() if (kind, layout) in FAST else pytest.mark.slow)
        for kind in CLEAR
        for layout in LAYOUTS
    ],
)
def test_transformers_generates_the_same(kind: str, layout: str) -> None:
    beams = {"num_beams": 3, "length_penalty": -0.5}
    calls = [(False, {"top_k": 1}), (True, {"top_k": 1}), (False, beams), (True, beams)]
    greedy, searched = expected(kind), expected(kind, **beams)
    assert len({tuple(row[-NEW:]) for row in greedy}) > 1
    replicas = 2 if "dp2" in layout else 1
    for results in run_ranks(generated, processes(layout), kind, layout, calls):
        for (rank, rows), true in zip(results, (greedy, greedy, searched, searched), strict=True):
            assert [stripped(row) for row in rows] == [stripped(row) for row in share(true, rank, replicas)]


def test_options_are_those_of_complete() -> None:
    """Sampling, a stop token, BOS; the random numbers of a seed; several stop tokens of the config."""
    with accelerating():
        model = clear_model("gpt2", bos_token_id=7)
        session, text = prepare(model, "one", None), megalith.load(model, device="cpu")
        ids, mask = padded(PROMPTS, True)
        for given, same in (
            ({"top_p": 0.8, "top_p_decay": 0.5, "temperature": 0.9}, {"top_p": 0.8, "top_p_decay": 0.5,
                                                                     "temperature": 0.9}),
            ({"top_k": 50, "temperature": 0.9, "random_seed": 7}, {"top_k": 50, "temperature": 0.9, "seed": 7}),
            ({"top_p": 0.9, "top_p_bound": 0.5, "top_p_decay": 0.9}, {"top_p": 0.9, "top_p_bound": 0.5,
                                                                     "top_p_decay": 0.9}),
            ({}, {}),
        ):  # fmt: skip
            rows = megatron_generate(session, ids, mask, max_new_tokens=NEW, stop_token=90, **given).tolist()
            made = complete(text, PROMPTS, max_new_tokens=NEW, stop_token_ids=90, **{"seed": 0} | same)
            ends = [[*one.prompt_ids, *one.ids] for one in made]
            assert rows == [end + [90] * (max(map(len, ends)) - len(end)) for end in ends]
        rows = megatron_generate(session, ids, mask, max_new_tokens=NEW, top_k=1, add_BOS=True).tolist()
        made = complete(text, [[7, *prompt] for prompt in PROMPTS], max_new_tokens=NEW, temperature=0.0,
                        stop_token_ids=0)  # fmt: skip
        assert [row[: len(one.prompt_ids) + len(one.ids)] for row, one in zip(rows, made)] == [
            one.prompt_ids + one.ids for one in made
        ]
        likely = [one.ids for one in complete(text, PROMPTS, max_new_tokens=NEW, temperature=0.0)]
        session.generation_config.eos_token_id = [likely[0][2], likely[1][4], 10**6]
        rows = megatron_generate(session, ids, mask, max_length=ids.shape[1] + NEW, top_k=1).tolist()
        assert rows[0][: len(PROMPTS[0]) + 3] == PROMPTS[0] + likely[0][:3]
        assert set(rows[0][len(PROMPTS[0]) + 3 :]) <= {likely[0][2]}  # as there is no pad_token_id
        assert megatron_generate(session, ids[:0], mask[:0], max_new_tokens=1).shape[0] == 0


IDS = torch.tensor([[1, 2, 3]])
WRONG: dict[str, dict[str, Any]] = {  # message -> options
    "`max_length` or `max_new_tokens` are required for inference": {"max_new_tokens": None},
    "temperature must be a positive number less than or equal to 100.0; found 0": {"temperature": 0},
    "temperature must be a positive number less than or equal to 100.0; found 101": {"temperature": 101},
    "top_k must be a positive number less than or equal to 1000; found 1001": {"top_k": 1001},
    "top_p and top_k sampling cannot be set together; found top_p 0.5 and top_k 3": {"top_k": 3, "top_p": 0.5},
    "top_p must be less than or equal to 1.0, and at least 0; found 1.5": {"top_p": 1.5},
    "top_p_decay must be less than or equal to 1.0": {"top_p_decay": 2.0},
    "top_p_bound must be less than or equal to 1.0": {"top_p_bound": 2.0},
    "add_BOS must be a boolean; found 1": {"add_BOS": 1},
    "beam_width must be an integer; found 2.5": {"num_beams": 2.5},
    "beam_width must be greater than 0; found 0": {"num_beams": 0},
    "stop_token must be an integer; found 'x'": {"stop_token": "x"},
    "max_new_tokens must be greater than 0; found 0": {"max_new_tokens": 0},
    "max_length must be at least the width of input_ids, 3; found 2": {"max_new_tokens": None, "max_length": 2},
    "and 62 new ones are asked for, together 65; the model's limit (max_position_embeddings) is 64":
        {"max_new_tokens": 62},
    "unknown option of megatron_generate top_P: did you mean top_p?": {"top_P": 0.5},
    "2 problems": {"top_k": -1, "top_p_bound": 7},
}  # fmt: skip


def test_what_cannot_be_is_told(tmp_path: pathlib.Path) -> None:
    with accelerating():
        session = prepare(toy_model("gpt2", bos_token_id=None), "one", None)
        for message, options in WRONG.items():
            with pytest.raises(ConfigError, match=re.escape(message)):
                megatron_generate(session, IDS, **{"max_new_tokens": 2, **options})
        session.generation_config.bos_token_id = None
        with pytest.raises(ConfigError, match="add_BOS needs a bos_token_id"):
            megatron_generate(session, IDS, max_new_tokens=2, add_BOS=True)
        with pytest.raises(DataError, match="found 100"):
            megatron_generate(session, IDS * 100, max_new_tokens=2)
        with pytest.raises(ConfigError, match="generate method is not implemented for this model; found 'bert'"):
            megatron_generate(prepare(toy_model("bert"), "one", None), IDS, max_new_tokens=2)
        session = prepare(toy_model("t5", decoder_start_token_id=None), "one", None)
        session.generation_config.decoder_start_token_id = None
        with pytest.raises(ConfigError, match="decoder_start_token_id must be in the model's config"):
            megatron_generate(session, IDS, max_new_tokens=2)
