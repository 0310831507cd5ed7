"""Streamed answers: their pieces add up to the whole answer, they end as they should, and a reader may leave."""

import json
import socket
import time

import openai
import pytest

from megalith.common.errors import MegalithError
from megalith.serving.openai import events as sse
from tests.serving.openai.conftest import events, post


def gathered(stream):
    """The choices that the events of a stream add up to, by their numbers."""
    choices = {}
    for each in stream:
        for choice in each["choices"]:
            kept = choices.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert kept["finish_reason"] is None, "a choice went on after its end"
            kept["text"] += choice["text"]
            kept["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                kept["logprobs"] = kept["logprobs"] or {}
                kept["logprobs"].setdefault(name, []).extend(values)
    return [{"index": number, **choices[number]} for number in sorted(choices)]


@pytest.mark.parametrize("body", [
    {"prompt": ["Once upon a time", "東京 😀"], "n": 2, "seed": 4, "max_tokens": 9},
    {"prompt": ["Once upon a time", "東京 😀"], "n": 2, "seed": 4, "echo": True, "stop": ["e", "中"]},
    {"prompt": ["Once upon a time", "東京 😀"], "n": 2, "seed": 4, "echo": True, "logprobs": 3, "max_tokens": 4},
    {"prompt": "東京", "echo": True, "logprobs": 0, "max_tokens": 0},
    {"prompt": "東京", "echo": True, "max_tokens": 0},
], ids=["plain", "stop", "logprobs", "scores", "nothing"])  # fmt: skip
def test_pieces_add_up_to_the_whole(served, body):
    _, whole = post(served[0], body)
    stream = events(served[0], {**body, "stream_options": {"include_usage": True}})
    assert stream.pop() == "[DONE]"
    usage = stream.pop()
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(each["usage"] is None and len(each["choices"]) == 1 for each in stream)
    assert len({each["id"] for each in [*stream, usage]}) == 1 and stream[0]["object"] == "text_completion"
    assert gathered(stream) == whole["choices"]
    assert "usage" not in events(served[0], body)[0]


def test_openai_client_streams(served, monkeypatch):
    step = served[1].engine.step
    monkeypatch.setattr(served[1].engine, "step", lambda: time.sleep(0.05) or step())
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    options = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 8}
    pieces = list(client.completions.create(**options, stream=True))
    assert len(pieces) > 3, "the text came at once"
    whole = client.completions.create(**options).choices[0]
    assert "".join(each.choices[0].text for each in pieces) == whole.text
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason


def slowed(engine, monkeypatch, seconds=0.1):
    """Make each step that reads prompts take so long; the list that it returns grows with each."""
    read, steps = engine.prefill.read, []

    def slow():
        steps.append(time.monotonic())
        time.sleep(seconds)
        read()

    monkeypatch.setattr(engine.prefill, "read", slow)
    return steps


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_while_its_prompt_is_read_frees_the_cache(make, serving_long, monkeypatch, stream):
    url, service = serving_long
    engine = service.engine
    steps = slowed(engine, monkeypatch)
    body = json.dumps({"prompt": [5] * 1900, "max_tokens": 3, "stream": stream}).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    lines = (
        "POST /v1/completions HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json",
        f"Content-Length: {len(body)}", "", "",
    )  # fmt: skip
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall("\r\n".join(lines).encode() + body)
        wait_for(lambda: engine.prefill.reading and engine.prefill.reading[0].prompt.filled)
        assert engine.cache.bytes_in_use > 0
        [reading] = engine.prefill.reading
        before = len(steps)
    wait_for(lambda: engine.cache.bytes_in_use == 0)
    assert len(steps) <= before + 2 and not reading.prompt.complete
    assert service.unfinished == 0 and not engine.busy
    monkeypatch.undo()
    assert post(url, {"prompt": "Once", "max_tokens": 1})[0] == 200


def test_long_wait_is_bridged_by_comments(serving_long, monkeypatch):
    url, service = serving_long
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.1)
    slowed(service.engine, monkeypatch, 0.15)
    stream = events(url, {"prompt": [5] * 1000, "max_tokens": 2})
    assert stream[0].startswith(":") and stream[-1] == "[DONE]"
    assert next(each for each in stream if isinstance(each, dict))["object"] == "text_completion"


def test_failure_ends_the_stream_with_an_error(served, monkeypatch):
    url, service = served
    step, running = service.engine.step, service.engine.running

    def failing():
        if any(len(active.state.new_ids) >= 3 for active in running):
            raise MegalithError("numbers without sense")
        return step()

    monkeypatch.setattr(service.engine, "step", failing)
    *pieces, error = events(url, {"prompt": "Once", "max_tokens": 50, "temperature": 0})
    assert pieces and "numbers without sense" in error["error"]["message"] and error["error"]["type"] == "server_error"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="numbers without sense"):
        list(client.completions.create(model="tiny", prompt="Once", stream=True, max_tokens=50))
    status, got = post(url, {"prompt": "Once", "max_tokens": 50, "temperature": 0})
    assert status == 500 and "numbers without sense" in got["error"]["message"]
