"""Whole generations: rows that do not notice each other, seeds, ends, scores, streams, errors."""

import functools
import json

import pytest
import torch

import megalith
from megalith.common.errors import CheckpointError, ConfigError, DataError
from megalith.config.flags.text import flag
from megalith.config.sections.model import ModelConfig
from megalith.generation.engine import Engine, Request
from megalith.generation.generate import complete, generate, score, stream
from megalith.generation.prompts import tokenize_prompts
from megalith.models.bert import BERT

PROMPTS = ["Once upon a time", "Z", "", "東京 and the model wrote a small naïve café"]


def greedy_without_cache(model, ids: list[int], count: int) -> list[int]:
    """Greedy decoding that reads everything again for each token."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"position_embedding_type": "rope", "num_query_groups": 2},
        {"position_embedding_type": "alibi"},
        {"softmax_scale": 0.9},
    ],
    ids=str,
)
def test_greedy_equals_reading_everything_again(form: dict, make) -> None:
    model = make(torch.float64, **form)
    for made in complete(model, PROMPTS, max_new_tokens=20, top_k=1, stop_at_eod=False):
        assert made.prompt_ids + made.ids == greedy_without_cache(model, made.prompt_ids, 20)
        assert made.finish == "length" and made.text == made.prompt + made.continuation


def test_a_row_does_not_notice_the_others(make) -> None:
    """The same texts one by one, in batches of two, and all together: row r of a call draws as row r."""
    model = make(torch.float64)
    options = {
        "max_new_tokens": 15,
        "temperature": 1.3,
        "top_p": 0.95,
        "seed": 11,
        "num_samples": 2,
        "stop_at_eod": False,
    }
    together = generate(model, PROMPTS, **options)
    assert len(together) == 8 and len(set(together)) == 8
    assert (
        together
        == generate(model, PROMPTS, batch_size=1, **options)
        == generate(model, PROMPTS, batch_size=3, **options)
    )
    assert (
        together[:2] == generate(model, PROMPTS[0], **options) == generate(model, [PROMPTS[0], "other"], **options)[:2]
    )
    assert together[2:4] == generate(model, ["x", PROMPTS[1]], **options)[2:4]


def test_seeds(make) -> None:
    model = make()
    first = generate(model, "Once", seed=1)
    assert first == generate(model, "Once", seed=1) != generate(model, "Once", seed=2)
    assert generate(model, "Once") != generate(model, "Once")  # no seed: another each time


def test_ends_at_the_end_of_document(make, tokenizer) -> None:
    model = make(torch.float64, untie_embeddings_and_output_weights=True)
    free = complete(model, PROMPTS, max_new_tokens=30, seed=3, stop_at_eod=False, logprobs=True)
    model.head.weight.data[0] = model.head.weight.data[free[0].ids[8]]  # makes the end of a document likely
    for made in complete(model, PROMPTS * 4, max_new_tokens=60, seed=3, logprobs=True):
        ended = made.ids[-1] == tokenizer.eod
        assert made.finish == ("stop" if ended else "length") and (ended or len(made.ids) == 60)
        assert tokenizer.eod not in made.ids[:-1] and len(made.logprobs) == len(made.ids)
        assert made.continuation == tokenizer.decode(made.ids[:-1] if ended else made.ids)
    assert {one.finish for one in complete(model, PROMPTS * 4, max_new_tokens=60, seed=3)} == {"stop", "length"}


def test_rows_that_end_are_dropped_and_change_nothing(make) -> None:
    """Nearly uniform probabilities: each token is the end of document once in 300."""
    model, options = make(torch.float64), {"max_new_tokens": 150, "seed": 4, "temperature": 20.0}
    one_by_one = complete(model, PROMPTS * 4, batch_size=1, **options)
    together = complete(model, PROMPTS * 4, batch_size=16, **options)
    assert [made.ids for made in one_by_one] == [made.ids for made in together]
    assert len({len(made.ids) for made in together}) > 3


def test_stop_texts(make) -> None:
    model = make(torch.float64)
    whole = complete(model, "Once", max_new_tokens=40, seed=5, stop_at_eod=False)[0].continuation
    stop = whole[10:13]
    made = complete(model, "Once", max_new_tokens=40, seed=5, stop_at_eod=False, stop=[stop])[0]
    assert made.continuation == whole[: whole.find(stop)] and made.finish == "stop" and len(made.ids) < 40


def test_pieces_of_a_stream_are_the_texts(make) -> None:
    model, pieces, tokens = make(), [""] * 8, [[] for _ in range(8)]

    def record(row: int, token: int, piece: str) -> None:
        pieces[row] += piece
        tokens[row].append(token)

    made = complete(model, PROMPTS, max_new_tokens=30, seed=6, num_samples=2, on_token=record, temperature=2.0)
    assert pieces == [one.continuation for one in made]
    assert tokens == [one.ids for one in made]


def test_no_prompt_starts_from_the_end_of_document(make, tokenizer) -> None:
    model = make()
    made = complete(model, max_new_tokens=5, seed=1)
    assert len(made) == 1 and made[0].prompt_ids == [tokenizer.eod] and made[0].text == made[0].continuation
    assert (
        generate(model, seed=1, max_new_tokens=5)
        == generate(model, [""], seed=1, max_new_tokens=5)
        == generate(model, "", seed=1, max_new_tokens=5)
    )
    assert complete(model, "Once", add_bos=True, max_new_tokens=1)[0].prompt_ids == [
        tokenizer.eod,
        *tokenizer.encode("Once"),
    ]


def test_lists_of_tokens_and_models_without_tokenizer(make, tokenizer) -> None:
    model = make(torch.float64)
    with_text = complete(model, "Once upon", max_new_tokens=9, seed=1)[0]
    assert complete(model, [tokenizer.encode("Once upon")], max_new_tokens=9, seed=1)[0] == with_text
    model.tokenizer = None
    bare = complete(model, [tokenizer.encode("Once upon")], max_new_tokens=9, seed=1)[0]
    assert bare.ids[: len(with_text.ids)] == with_text.ids and bare.continuation is None
    for wrong in ("Once", [[]], None):
        with pytest.raises(ConfigError, match="tokenizer"):
            generate(model, wrong)
    with pytest.raises(ConfigError, match="tokenizer"):
        generate(model, [[1, 2]])


def test_logprobs_are_those_of_the_model(make) -> None:
    model = make(torch.float64, z_loss_coeff=0.1)
    texts = [*PROMPTS, "the model wrote", "small"]
    scores = score(model, texts, batch_size=4)
    assert model.token_loss.z_loss == 0.1
    for one, row in zip(texts, scores):
        ids = model.tokenizer.encode(one) or [model.tokenizer.eod]
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        assert row == pytest.approx([logprobs[i, token].item() for i, token in enumerate(ids[1:])], abs=1e-5)
    for made in complete(model, PROMPTS, max_new_tokens=12, seed=1, temperature=2.0, top_k=20, logprobs=True):
        whole = score(model, [made.prompt_ids + made.ids])[0]
        assert whole[len(made.prompt_ids) - 1 :] == pytest.approx(made.logprobs, abs=1e-4)


def test_nothing_new_is_nothing_new(make) -> None:
    made = complete(make(), PROMPTS[:2], max_new_tokens=0)
    assert [one.text for one in made] == PROMPTS[:2] and all(not one.ids for one in made)
    assert complete(make(), []) == []


def test_an_engine_can_be_kept(make) -> None:
    model = make(torch.float64)
    engine = Engine(model, max_length=128)
    for _ in range(2):
        assert generate(engine, PROMPTS, seed=1, max_new_tokens=7) == generate(model, PROMPTS, seed=1, max_new_tokens=7)
        assert engine.cache.bytes_in_use == 0
    with pytest.raises(ConfigError, match=r"at most 128, .*; found 13\d"):
        generate(engine, "Once", max_new_tokens=128)
    engine.add(Request(prompt_ids=[1]))
    with pytest.raises(ConfigError, match="requests that others added"):
        generate(engine, "Once")


def test_a_stream_can_be_left(make) -> None:
    model = make()
    whole = list(stream(model, PROMPTS, seed=2, max_new_tokens=9, num_samples=2))
    made = complete(model, PROMPTS, seed=2, max_new_tokens=9, num_samples=2)
    for number, one in enumerate(made):
        assert [token for row, token, _ in whole if row == number] == one.ids
        assert "".join(piece for row, _, piece in whole if row == number) == one.continuation
    engine = Engine(model, max_batch_size=3)
    pieces = stream(engine, PROMPTS, seed=2)
    next(pieces)
    assert engine.busy and engine.cache.bytes_in_use
    pieces.close()
    assert not engine.busy and engine.cache.bytes_in_use == 0


def test_too_long_names_the_limit(make) -> None:
    with pytest.raises(ConfigError, match=r"1 tokens and 200 new.*201.*limit.*200.*at most 199"):
        generate(make(), [[5]], max_new_tokens=200)
    assert len(complete(make(), [[5]], max_new_tokens=199, stop_at_eod=False)[0].ids) == 199
    assert (
        len(complete(make(position_embedding_type="alibi"), [[5]], max_new_tokens=210, stop_at_eod=False)[0].ids) == 210
    )
    with pytest.raises(
        ConfigError, match=r"prompt has 201 tokens; .* is 200\. Shorten the prompt to at most 200 tokens\.$"
    ):
        score(make(), [[5] * 201])


@pytest.mark.parametrize(
    ("prompt", "new", "cure"),
    [
        (200, 10, "Shorten the prompt to at most 190 tokens."),
        (230, 10, "Shorten the prompt to at most 190 tokens."),
        (230, 200, "Shorten the prompt, and ask for fewer new tokens, so that they are at most 200 together."),
        (199, 2, "Shorten the prompt or ask for at most 1 new tokens."),
    ],
)
def test_a_prompt_too_long_is_not_cured_by_no_new_tokens(make, prompt, new, cure) -> None:
    for search in ({}, {"beam_width": 2}):
        with pytest.raises(ConfigError) as caught:
            generate(make(), [[5] * prompt], max_new_tokens=new, **search)
        assert str(caught.value).endswith(cure)


def test_wrong_values(make) -> None:
    model = make()
    with pytest.raises(DataError, match=r"300.*tokens"):
        generate(model, [[5, 300]])
    for wrong in ({"num_samples": 0}, {"max_new_tokens": -1}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=flag(next(iter(wrong)))):
            generate(model, "Once", **wrong)
    with pytest.raises(ConfigError, match="--batch-size must be at least 1; found 0"):
        score(model, "Once", batch_size=0)
    model.final_norm.weight.data.fill_(float("nan"))
    for write in (generate, score, functools.partial(generate, beam_width=2)):
        with pytest.raises(CheckpointError, match="NaN"):
            write(model, "Once")


def test_the_words_of_the_package(make) -> None:
    assert megalith.generate(make(), "Once", max_new_tokens=3, seed=1)[0].startswith("Once")
    assert json.dumps(megalith.generate(make(), ["Once"], max_new_tokens=3))


def test_a_model_that_takes_no_cache_is_named(make) -> None:
    class Bare(type(make().model)):
        def forward(self, inputs):  # type: ignore[override]
            return super().forward(inputs)

    with pytest.raises(ConfigError, match=r"must take cache .* in its forward .*; found a Bare\. Add them"):
        complete(Bare(make().config).eval(), [[1, 2]])


@pytest.mark.parametrize("call", [complete, score])
def test_only_models_that_read_from_left_to_right_write(call) -> None:
    model = BERT(
        ModelConfig(
            model_type="bert",
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            max_position_embeddings=8,
            vocab_size=9,
        )
    )
    with pytest.raises(ConfigError, match=r"The model must read from left to right .*; found 'bert'\."):
        call(model.eval(), [[1, 2]])


@pytest.mark.parametrize(
    ("prompt", "named"),
    [("Once upon", "the prompt 'Once upon' has token"), (None, "a text without a prompt starts from")],
)
def test_a_tokenizer_of_another_model_is_the_cause_and_not_the_prompt(make, tokenizer, prompt, named) -> None:
    model = make(vocab_size=tokenizer.vocab_size - 100)
    model.tokenizer = _HighTokens(tokenizer)
    with pytest.raises(
        DataError, match=f"the tokenizer has 300 tokens and the embedding 200 rows: name the tokenizer that .*{named}"
    ):
        tokenize_prompts(model, prompt)


class _HighTokens:
    """The tokenizer, whose first ids are its last ones."""

    def __init__(self, tokenizer) -> None:
        self.vocab_size, self.encode = tokenizer.vocab_size, lambda text: [tokenizer.vocab_size - 1]

    def require(self, name: str) -> int:
        return self.vocab_size - 1
