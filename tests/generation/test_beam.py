"""Beam search against trying everything, and its rules for ending."""

import itertools

import pytest
import torch

from megalith.common.errors import ConfigError
from megalith.generation.beam import Beam, BeamHypotheses, beam_search
from megalith.generation.cache import KVCache
from megalith.generation.generate import complete, generate, score
from megalith.generation.runner import ModelRunner

SMALL = 6  # tokens of a vocabulary in which every continuation can be tried


@pytest.fixture
def small(make):
    model = make(torch.float64, vocab_size=SMALL, init_method_std=1.0)
    model.tokenizer = None
    return model


def all_hypotheses(
    model, prompt: list[int], count: int, stop: int | None, penalty: float
) -> list[tuple[float, tuple[int, ...]]]:
    """Every hypothesis with its score, best first."""
    found = {}
    for tokens in itertools.product(range(SMALL), repeat=count):
        end = tokens.index(stop) + 1 if stop in tokens else count
        found[tokens[:end]] = None
    rows = score(model, [prompt + list(tokens) for tokens in found])
    scored = [(sum(row[len(prompt) - 1 :]) / len(tokens) ** penalty, tokens) for row, tokens in zip(rows, found)]
    return sorted(scored, reverse=True)


def test_wide_beams_find_the_best_of_all(small) -> None:
    for prompt in ([1], [2, 5, 3]):
        best = all_hypotheses(small, prompt, 3, None, 1.0)[:5]
        made = beam_search(small, prompt, beam_width=SMALL**2, max_new_tokens=3)
        assert [tuple(one.ids) for one in made[:5]] == [tokens for _, tokens in best]
        assert [one.score for one in made[:5]] == pytest.approx([value for value, _ in best], abs=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 3.0])
def test_stop_tokens_and_length_penalty(penalty: float, small) -> None:
    known = {tokens: value for value, tokens in all_hypotheses(small, [1, 2], 3, 4, penalty)}
    made = beam_search(small, [1, 2], beam_width=SMALL**2, max_new_tokens=3, length_penalty=penalty, stop_token_ids=[4])
    assert [one.score for one in made] == sorted((one.score for one in made), reverse=True)
    for one in made:
        assert 4 not in one.ids[:-1] and one.score == pytest.approx(known[tuple(one.ids)], abs=1e-5)
        assert one.finish == ("stop" if one.ids[-1] == 4 else "length")
    assert {one.finish for one in made} == {"length", "stop"}


def test_a_beam_goes_on_where_all_likely_tokens_stop(small) -> None:
    """A penalty of 20 makes every longer text the better one."""
    rare = small(torch.tensor([[1, 2]]))[0, -1].argmin().item()
    stops = [token for token in range(SMALL) if token != rare]
    options = {"beam_width": 2, "max_new_tokens": 3, "length_penalty": 20.0}
    made = beam_search(small, [1, 2], stop_token_ids=stops, **options)
    likeliest = small(torch.tensor([[1, 2, rare, rare]]))[0, -1].topk(2).indices.tolist()
    assert [one.ids for one in made] == [[rare, rare, token] for token in likeliest]


def test_penalties_beyond_a_double_are_refused(small) -> None:
    for penalty in (31.0, -31.0, float("nan")):
        with pytest.raises(ConfigError, match="--length-penalty must lie between -30 and 30"):
            beam_search(small, [1], length_penalty=penalty)


def test_one_beam_is_greedy(make) -> None:
    model = make(torch.float64)
    greedy = complete(model, "Once upon", top_k=1, max_new_tokens=12, stop_at_eod=False)[0]
    assert (
        beam_search(model, greedy.prompt_ids, beam_width=1, max_new_tokens=12, stop_token_ids=())[0].ids == greedy.ids
    )


def test_several_beams_are_no_worse_than_one(make) -> None:
    model = make(torch.float64)
    prompt = model.tokenizer.encode("Once upon")
    for count in (2, 6):
        one, many = (
            beam_search(model, prompt, beam_width=width, max_new_tokens=count, stop_token_ids=())[0].score
            for width in (1, 8)
        )
        assert many >= one - 1e-9


def test_stopped_hypotheses_have_their_stop_token_but_not_its_text(make) -> None:
    model = make(torch.float64)
    prompt = model.tokenizer.encode("Once upon")
    (free,) = beam_search(model, prompt, beam_width=1, max_new_tokens=9, stop_token_ids=())
    stops = sorted({free.ids[4], free.ids[7]})
    made = beam_search(model, prompt, beam_width=3, max_new_tokens=9, stop_token_ids=stops, logprobs=True)
    assert "stop" in {one.finish for one in made}
    for one in made:
        stopped = one.finish == "stop"
        assert (one.ids[-1] in stops) == stopped and not set(one.ids[:-1]) & set(stops)
        assert one.continuation == model.tokenizer.decode(one.ids[:-1] if stopped else one.ids)
        assert one.score == pytest.approx(sum(one.logprobs) / len(one.ids))
        assert one.logprobs == pytest.approx(score(model, [prompt + one.ids])[0][len(prompt) - 1 :], abs=1e-5)


def test_the_prompt_is_read_once_and_each_step_is_one_call(make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, copied = [], []
    prefill, decode, select = ModelRunner.prefill, ModelRunner.decode, KVCache.select
    monkeypatch.setattr(ModelRunner, "prefill", lambda *given: calls.append(given[1][0].ids) or prefill(*given))
    monkeypatch.setattr(ModelRunner, "decode", lambda *given: calls.append(len(given[1])) or decode(*given))
    monkeypatch.setattr(KVCache, "select", lambda *given, start: copied.append(start) or select(*given, start=start))
    beam_search(make(), [3] * 70, beam_width=4, max_new_tokens=6, stop_token_ids=())
    assert calls == [[3] * 70, 4, 4, 4, 4, 4] and copied == [0, 70, 70, 70, 70]


def test_rules_for_ending() -> None:
    """Scores are sums over length^penalty, and only the best hypotheses are kept. The search is done when the worst of
    them is no worse than the best unfinished one.
    """
    finished = BeamHypotheses(2, 1.0)
    finished.add(Beam(-2.0, (1, 4)), "stop")
    assert not finished.is_done(-100.0, 2)  # not full yet
    finished.add(Beam(-6.0, (2, 1, 4)), "stop")
    finished.add(Beam(-8.0, (3, 4)), "stop")
    assert [entry[0] for entry in finished.best] == [-1.0, -2.0]
    assert not finished.is_done(-5.9, 3) and finished.is_done(-6.0, 3) and finished.is_done(-9.0, 4)


def test_texts_and_wrong_values(make) -> None:
    model = make()
    texts = generate(model, ["Once", "Z"], beam_width=3, num_samples=2, max_new_tokens=5)
    assert len(texts) == 4 and all(text.startswith("Once") for text in texts[:2]) and texts[2].startswith("Z")
    assert generate(model, beam_width=2, max_new_tokens=4)
    options = {"beam_width": 2, "max_new_tokens": 4}
    assert generate(model, "Once", seed=3, length_penalty=2.0, **options) == generate(
        model, "Once", length_penalty=2.0, **options
    )
    for wrong in ({"temperature": 0.5}, {"top_k": 3}, {"stop": ["x"]}, {"stop_on_eol": True}, {"greedy": True}):
        name = "temperature" if "greedy" in wrong else next(iter(wrong))
        with pytest.raises(ConfigError, match=rf"--beam-width must be given without options .*; found 2 and {name}"):
            generate(model, "Once", **options, **wrong)
    for wrong in ({"beam_width": 0}, {"max_new_tokens": 0}, {"max_new_tokens": 500}, {"num_samples": 0}):
        with pytest.raises(ConfigError):
            beam_search(model, [1], **wrong)
    with pytest.raises(
        ConfigError, match=r"--num-samples must lie between 1 and 2, the number of beams; found 3\. Ask"
    ):
        generate(model, "Once", **options, num_samples=3)
