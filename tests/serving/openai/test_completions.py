"""/v1/completions: what OpenAI's client, curl and plain HTTP get is what `complete` and `score` give."""

import itertools
import json
import shutil
import subprocess

import openai
import pytest

from megalith.generation.engine import Engine
from megalith.generation.generate import complete, score, stream
from tests.serving.openai.conftest import post

TEXT = "Zürich, 東京 😀 once"
CASES = {
    "greedy": ({"prompt": "Once upon", "temperature": 0}, {}),
    "seeded": ({"prompt": ["Once", TEXT], "seed": 7, "n": 2, "max_tokens": 9}, {}),
    "tokens": ({"prompt": [[5, 6, 7], [8]], "seed": 1, "top_p": 0.8}, {}),
    "one list of tokens": ({"prompt": [5, 6, 7], "seed": 1, "frequency_penalty": 1, "presence_penalty": 1.5}, {}),
    "nothing": ({"seed": 3}, {}),
    "of other servers": (
        {"prompt": "a", "seed": 3, "max_tokens": 6},
        {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "ignore_eos": True, "min_tokens": 2, "add_bos": True},
    ),
    "nucleus that shrinks": (
        {"prompt": "a", "seed": 3, "top_p": 0.9, "max_tokens": 9},
        {"top_p_decay": 0.7, "top_p_bound": 0.2},
    ),
    "bias": ({"prompt": "a", "seed": 3, "logit_bias": {"65": 60, "66": 61}, "max_tokens": 4}, {}),
    "likeliest": ({"prompt": "a", "seed": 3, "top_p": 0, "best_of": 1}, {"top_k": -1}),
}
MEANS = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "n": "num_samples"}


def expected(model, body):
    """What `complete` gives for the fields of a request."""
    body = {MEANS.get(name, name): value for name, value in body.items() if name != "best_of"}
    if body.pop("ignore_eos", False):
        body["stop_at_eod"] = False
    if "logit_bias" in body:
        body["logit_bias"] = {int(token): bias for token, bias in body["logit_bias"].items()}
    if body.get("top_p") == 0:
        body |= {"top_p": 0.0, "temperature": 0.0, "top_k": 0}
    return complete(model, body.pop("prompt", ""), **{"max_new_tokens": 16, **body})


def test_openai_client_gets_what_complete_writes(served, make):
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    for name, (fields, extra) in CASES.items():
        got = client.completions.create(model="tiny", extra_body=extra, **{"prompt": "", **fields})
        wanted = expected(make(), {**fields, **extra})
        assert [(each.text, each.finish_reason) for each in got.choices] == [
            (each.continuation, each.finish) for each in wanted
        ], name
        assert [each.index for each in got.choices] == list(range(len(wanted)))
        prompts = {tuple(each.prompt_ids) for each in wanted}
        new = sum(len(each.ids) for each in wanted)
        assert got.usage.prompt_tokens == sum(map(len, prompts)) and got.usage.completion_tokens == new
        assert got.usage.total_tokens == got.usage.prompt_tokens + new
        assert got.id.startswith("cmpl-") and got.object == "text_completion" and got.model == "tiny"


def test_stop_texts_end_the_text_and_are_no_part_of_it(served, make):
    whole = complete(make(), "Once", max_new_tokens=12, temperature=0.0)[0].continuation
    stop = whole[5:7]
    status, got = post(served[0], {"prompt": "Once", "max_tokens": 12, "temperature": 0, "stop": stop})
    choice = got["choices"][0]
    assert status == 200 and choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    _, got = post(served[0], {"prompt": "Once", "max_tokens": 12, "temperature": 0, "stop": ["never so", stop]})
    assert got["choices"] == [choice]
    token = complete(make(), "Once", max_new_tokens=12, temperature=0.0)[0].ids[3]
    got = post(served[0], {"prompt": "Once", "max_tokens": 12, "temperature": 0, "stop_token_ids": [token]})[1]
    wanted = complete(make(), "Once", max_new_tokens=12, temperature=0.0, stop_token_ids=[token])[0]
    assert got["choices"][0]["text"] == wanted.continuation and wanted.finish == "stop"


@pytest.mark.parametrize("new", [0, 1, 5])
def test_echo_and_logprobs_are_those_of_score(served, make, new):
    model, body = make(), {"prompt": [TEXT, "Once"], "max_tokens": new, "echo": True, "logprobs": 2, "temperature": 0}
    _, got = post(served[0], body)
    wanted = complete(model, body["prompt"], max_new_tokens=new, temperature=0.0, top_logprobs=2)
    for choice, logprobs, completion in zip(got["choices"], score(model, body["prompt"]), wanted, strict=True):
        found, ids = choice["logprobs"], completion.prompt_ids + completion.ids
        assert choice["text"] == completion.text and choice["finish_reason"] == "length"
        assert found["token_logprobs"] == [None, *logprobs, *(completion.logprobs or [])]
        assert all(len(values) == len(ids) for values in found.values())
        said, prompt = b"", len(completion.prompt_ids)
        for token, place in zip(found["tokens"][:prompt], found["text_offset"]):
            assert place == len(said.decode(errors="ignore"))
            if token.startswith("bytes:"):
                said += bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
            else:
                assert choice["text"][place:].startswith(token)
                said += token.encode()
        assert said.decode() == completion.prompt
        pieces = [len(piece) for *_, piece in stream(model, completion.prompt, max_new_tokens=new, temperature=0.0)]
        starts = list(itertools.accumulate(pieces, initial=len(completion.prompt)))
        assert found["text_offset"][prompt:] == starts[:new]
        assert found["top_logprobs"][0] is None
        for token, top in zip(found["tokens"][1:], found["top_logprobs"][1:]):
            assert token in top and 2 <= len(top) <= 3
        best = [max(top.values()) for top in found["top_logprobs"][-new:]] if new else []
        assert best == found["token_logprobs"][len(ids) - new :]  # greedy, and the very same numbers
    assert any(token.startswith("bytes:") for token in got["choices"][0]["logprobs"]["tokens"])
    assert got["usage"]["completion_tokens"] == 2 * new


def test_logprobs_without_echo_count_from_the_new_text(served, make):
    _, got = post(served[0], {"prompt": "Once", "max_tokens": 4, "logprobs": 0, "seed": 2})
    wanted = complete(Engine(make()), "Once", max_new_tokens=4, logprobs=True, seed=2)[0]  # of as many rows
    found = got["choices"][0]["logprobs"]
    assert found["token_logprobs"] == wanted.logprobs and found["text_offset"][0] == 0
    assert found["top_logprobs"] == [{t: p} for t, p in zip(found["tokens"], wanted.logprobs)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(served, make):
    body = {"prompt": "Once", "max_tokens": 5, "temperature": 0}
    command = ["curl", "-s", f"{served[0]}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    got = subprocess.run([*command, json.dumps(body)], capture_output=True, timeout=60, check=True).stdout
    wanted = complete(make(), "Once", max_new_tokens=5, temperature=0.0)[0].continuation
    assert json.loads(got)["choices"][0]["text"] == wanted
    streamed = subprocess.run(
        [*command, json.dumps({**body, "stream": True}), "-N"], capture_output=True, timeout=60, check=True
    ).stdout.decode()
    pieces = [each.removeprefix("data: ") for each in streamed.split("\n\n") if each]
    assert pieces.pop() == "[DONE]"
    assert "".join(json.loads(each)["choices"][0]["text"] for each in pieces) == wanted


def test_models(served):
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    [model] = client.models.list().data
    assert model.id == "tiny" and model == client.models.retrieve("tiny")
    assert model.max_model_len == 200 and model.chat_template is False
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.models.retrieve("other")


def test_beams(served, make):
    wanted = complete(make(), "Once", beam_width=3, num_samples=2, max_new_tokens=5, logprobs=True, length_penalty=0.7)
    body = {"prompt": "Once", "n": 2, "max_tokens": 5, "logprobs": 0, "temperature": 0, "length_penalty": 0.7}
    got = post(served[0], {**body, "beam_width": 3})[1]["choices"]
    assert [each["text"] for each in got] == [each.continuation for each in wanted]
    for choice, each in zip(got, wanted):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(each.logprobs, abs=1e-5)
    two = complete(make(), "Once", beam_width=2, num_samples=2, max_new_tokens=5, length_penalty=0.7)
    got = post(served[0], {**body, "use_beam_search": True})[1]["choices"]
    assert [each["text"] for each in got] == [each.continuation for each in two]
