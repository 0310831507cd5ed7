"""Options of texts, all prompts alike or each its own: results against plain references."""

import itertools

import pytest
import torch

import megalith
from megalith.common.errors import ConfigError, DataError
from megalith.generation.engine import Engine
from megalith.generation.generate import complete, generate, score, stream
from megalith.generation.params import GenerationParams
from megalith.generation.prompts import prompt_list, tokenize_prompt
from megalith.generation.stream import REPLACEMENT_CHARACTER
from tests.generation.test_stream import first_stop
from tests.generation.vocabularies import make_tokenizer

PROMPTS = ["Once upon a time", "Z", "", "東京 and the model"]


def test_each_prompt_has_its_own_options(make) -> None:
    """Completion number i of a call draws from (seed, i), so that a prompt may be given alone at the same number."""
    model = make(torch.float64)
    params = [
        GenerationParams(seed=1, top_k=20, max_new_tokens=5),
        GenerationParams(temperature=0.0, max_new_tokens=9),
        GenerationParams(beam_width=3, num_samples=2, max_new_tokens=4, logprobs=True),
        GenerationParams(seed=1, num_samples=2, max_new_tokens=7, logprobs=True, add_bos=True, echo=False),
    ]
    made = complete(model, PROMPTS, params=params, stop_at_eod=False)
    assert [len(one.ids) for one in made] == [5, 9, 4, 4, 7, 7]
    rows = [made[:1], made[1:2], made[2:4], made[4:]]
    for number, (prompt, each) in enumerate(zip(PROMPTS, params)):
        before = [GenerationParams(max_new_tokens=0, num_samples=(1, 1, 2, 2)[i]) for i in range(number)]
        alone = complete(model, [""] * number + [prompt], params=[*before, each], stop_at_eod=False)
        assert alone[sum(one.num_samples for one in before) :] == rows[number]
    assert made[4].prompt_ids[0] == model.tokenizer.eod and made[4].text == made[4].continuation != made[5].text
    assert made[0].text.startswith(PROMPTS[0]) and made[0].logprobs is None and len(made[4].logprobs) == 7
    assert made[2].score == pytest.approx(sum(made[2].logprobs) / 4, abs=1e-6) and made[2].score >= made[3].score
    with pytest.raises(ConfigError, match="params must be one for all prompts, or one for each; found 4 for 3 prompts"):
        complete(model, PROMPTS[:3], params=params)


def test_log_probabilities_are_those_of_reading_the_whole_text(make) -> None:
    model = make(torch.float64)
    options = {"max_new_tokens": 9, "num_samples": 2, "seed": 3, "temperature": 2.0}
    plain = complete(model, PROMPTS, **options)
    made = complete(model, PROMPTS, logprobs=True, top_logprobs=4, prompt_logprobs=True, **options)
    for one, bare in zip(made, plain):
        assert one.ids == bare.ids and bare.logprobs is bare.top_logprobs is bare.prompt_logprobs is None
        ids = one.prompt_ids + one.ids
        logprobs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        expected = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        count = len(one.prompt_ids) - 1
        assert one.prompt_logprobs == pytest.approx(expected[:count], abs=1e-5)
        assert one.logprobs == pytest.approx(expected[count:], abs=1e-5)
        values, tokens = logprobs[:-1].topk(4)
        tops = one.prompt_top_logprobs + one.top_logprobs
        assert [[token for token, _ in top] for top in tops] == tokens.tolist()
        found = [value for top in tops for _, value in top]
        assert found == pytest.approx(values.flatten().tolist(), abs=1e-5)
    (scored,) = complete(model, PROMPTS[0], max_new_tokens=0, prompt_logprobs=True)
    assert scored.prompt_logprobs == pytest.approx(score(model, PROMPTS[0])[0]) and scored.prompt_top_logprobs is None
    assert scored.ids == [] and scored.text == PROMPTS[0] and list(stream(model, "Z", max_new_tokens=0)) == []
    (only_top,) = complete(model, "Z", top_logprobs=2, max_new_tokens=3)
    assert [len(top) for top in only_top.top_logprobs] == [2] * len(only_top.ids) == [2] * len(only_top.logprobs)


@pytest.mark.parametrize("name", ["HuggingFaceTokenizer", "Llama2Tokenizer bytes", "BertWordPieceLowerCase"])
def test_stop_texts_cut_the_text_and_keep_the_tokens(name: str, make, tmp_path) -> None:
    tokenizer = make_tokenizer(name, tmp_path)
    model = make(torch.float64, vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    options = {"seed": 5, "max_new_tokens": 25, "stop_at_eod": False, "logprobs": True, "num_samples": 3}
    free = complete(model, [[5, 6]], **options)
    for start, length in itertools.product((0, 7), (1, 2, 5)):
        stops = tuple(filter(None, (one.continuation[start : start + length] for one in free)))
        made = complete(model, [[5, 6]], stop=stops, **options)
        pieces = [""] * 3
        for number, _, text in stream(model, [[5, 6]], stop=stops, **{**options, "logprobs": False}):
            pieces[number] += text
        for one, whole, piece in zip(made, free, pieces):
            assert one.continuation == piece == first_stop(whole.continuation, stops)
            assert one.ids == whole.ids[: len(one.ids)] and one.logprobs == whole.logprobs[: len(one.ids)]
            assert one.finish == ("length" if piece == whole.continuation else "stop")
            for count in range(len(one.ids)):  # no token too many
                text = tokenizer.decode([5, 6, *whole.ids[:count]]).removeprefix(tokenizer.decode([5, 6]))
                certain = text.rstrip(REPLACEMENT_CHARACTER)
                assert first_stop(certain, stops) == certain


def test_stop_texts_count_after_min_new_tokens(make, tokenizer) -> None:
    model = make(torch.float64)
    options = {"seed": 2, "max_new_tokens": 20, "stop_at_eod": False}
    (free,) = complete(model, "Once", **options)
    stops = tuple(set(free.continuation[:4]))
    for least in (0, 5):
        (made,) = complete(model, "Once", stop=stops, min_new_tokens=least, **options)
        first = tokenizer.decode(free.ids[:least]).rstrip(REPLACEMENT_CHARACTER)
        assert made.continuation == first + first_stop(free.continuation[len(first) :], stops)
        assert made.finish == "stop" and least < len(made.ids) < 20


def test_a_stop_text_that_is_found_at_the_end_counts(make, tokenizer) -> None:
    """Half characters are held back until the text has its last token; what they then are may be a stop text."""
    half = tokenizer.encode("東")[0]
    options = {"logit_bias": {half: 200.0}, "max_new_tokens": 3}
    (free,) = complete(make(), "Once", **options)
    assert (free.ids, free.continuation, free.finish) == ([half] * 3, REPLACEMENT_CHARACTER * 3, "length")
    (made,) = complete(make(), "Once", stop=REPLACEMENT_CHARACTER, **options)
    assert (made.ids, made.continuation, made.finish) == ([half] * 3, "", "stop")


def test_stop_tokens(make, tokenizer) -> None:
    model = make(torch.float64)
    (free,) = complete(model, "Once", seed=1, max_new_tokens=20, stop_at_eod=False)
    stop = free.ids[7]
    end = free.ids.index(stop)
    for tokens in ([stop], (299, stop), stop):
        (made,) = complete(model, "Once", seed=1, max_new_tokens=20, stop_at_eod=False, stop_token_ids=tokens)
        assert (made.ids, made.finish) == (free.ids[: end + 1], "stop")
        assert made.continuation == tokenizer.decode(free.ids[:end])
    with pytest.raises(DataError, match=r"--stop-token-ids must be among the 300 tokens .*; found 300"):
        complete(model, "Once", stop_token_ids=[300])
    model.tokenizer = None
    with pytest.raises(ConfigError, match="--stop must be left out, because this model has no tokenizer"):
        complete(model, [[1]], stop="a")


def test_prompts_of_every_form(make, tmp_path) -> None:
    model = make(torch.float64)
    ids = model.tokenizer.encode("Once")
    forms = ["Once", ["Once"], ids, [ids], tuple(ids), torch.tensor([ids]).tolist()]
    assert len({tuple(complete(model, form, seed=1)[0].prompt_ids) for form in forms}) == 1
    empty = [complete(model, form, seed=1)[0] for form in (None, "", [""], [[]])]
    assert all(one == empty[0] and one.prompt_ids == [model.tokenizer.eod] for one in empty)
    assert prompt_list([]) == [] == complete(model, []) == generate(model, []) == list(stream(model, []))
    model.tokenizer = make_tokenizer("Llama2Tokenizer bytes", tmp_path)  # puts BOS before every text, and none too
    for form in ("", []):
        assert tokenize_prompt(model, form).prompt_ids == [model.tokenizer.bos]
        assert tokenize_prompt(model, form, add_bos=True).prompt_ids == [model.tokenizer.eod, model.tokenizer.bos]


def test_the_prompt_that_is_too_long_is_named(make) -> None:
    model = make()
    engine, long = Engine(model, max_length=200), [[5], [6] * 150, [7]]
    calls = (
        generate,
        complete,
        stream,
        lambda model, prompts, **options: complete(model, prompts, beam_width=2, **options),
    )
    for model_or_engine, call in itertools.product((model, engine), calls):
        with pytest.raises(
            ConfigError, match=r"^too long: prompt 1 has 150 tokens and 51 new ones .* together 201; .* 200"
        ):
            call(model_or_engine, long, max_new_tokens=51)
    with pytest.raises(ConfigError, match=r"^too long: prompt 1 has 201 tokens; .* is 200"):
        score(model, [[5], [6] * 201])
    with pytest.raises(ConfigError, match=r"^too long: the prompt has 150 tokens and 51 new ones"):
        generate(model, long[1], max_new_tokens=51)
    params = [GenerationParams(max_new_tokens=new) for new in (199, 50, 3)]  # each fits by itself
    assert len(generate(model, long, params=params, greedy=True)) == 3
    assert not engine.busy


def test_a_path_is_a_model(run) -> None:
    folder, model = run
    for call in (
        megalith.generate,
        megalith.complete,
        lambda *args, **options: list(megalith.stream(*args, **options)),
    ):
        assert call(folder, "Once", seed=1, max_new_tokens=5) == call(model, "Once", seed=1, max_new_tokens=5)
    assert score(str(folder), "Once") == score(model, "Once")
    assert torch.equal(
        megalith.generate_tokens(folder, torch.tensor([[5, 6]]), max_new_tokens=3),
        megalith.generate_tokens(model, torch.tensor([[5, 6]]), max_new_tokens=3),
    )


def test_beams_are_not_streamed(make) -> None:
    for call in (stream, lambda *args, **options: generate(*args, on_token=print, **options)):
        with pytest.raises(ConfigError, match="--beam-width must be left out where texts are streamed"):
            call(make(), ["Once", "Z"], params=[GenerationParams(), GenerationParams(beam_width=2)])


def test_engine_options_change_no_text(make) -> None:
    model = make(torch.float64)
    options = {"seed": 4, "max_new_tokens": 12, "num_samples": 2}
    expected = generate(model, PROMPTS, **options)
    assert generate(model, PROMPTS, batch_invariant=False, **options) == expected
    assert generate(model, PROMPTS, batch_size=3, **options) == expected
