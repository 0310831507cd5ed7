"""What /v1/completions refuses, and the form in which every error comes."""

import json
import urllib.error
import urllib.request

import openai
import pytest

from tests.serving.openai.conftest import post

# (fields, the field that the error is about, words of its message)
WRONG = [
    ({"temprature": 1}, "temprature", "did you mean temperature"),
    ({"flying": True}, "flying", "unknown field"),
    ({"prompt": []}, "prompt", "a list of token numbers"),
    ({"prompt": [["a"]]}, "prompt", "a list of token numbers"),
    ({"prompt": ["a", 5]}, "prompt", "a list of token numbers"),
    ({"prompt": [True]}, "prompt", "a list of token numbers"),
    ({"prompt": [2**40]}, "prompt", "a list of token numbers"),
    ({"prompt": "\ud800"}, "prompt", "a list of token numbers"),
    ({"prompt": [[1], [300]]}, None, "Every token of prompt 1"),
    ({"prompt": ["a"] * 100, "n": 100}, "n", "must be at most 1024"),
    ({"temperature": "1"}, "temperature", "a valid number; found '1'"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"max_tokens": 1.5}, "max_tokens", "a valid integer"),
    ({"max_tokens": True}, "max_tokens", "a valid integer"),
    ({"max_tokens": 500}, None, "too long"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "max_completion_tokens"),
    ({"min_tokens": 17}, "min_tokens", "must be at most"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"best_of": 3}, "best_of", "must equal n"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "a valid integer"),
    ({"stop": ""}, "stop", "of 1 to 256 characters"),
    ({"stop": "x" * 257}, "stop", "of 1 to 256 characters"),
    ({"stop": ["a", 5]}, "stop", "a text or a list"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token numbers"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"5": True}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"5000": 1}}, "logit_bias", "300 of the model's vocabulary"),
    ({"stop_token_ids": [5000]}, "stop_token_ids", "300 tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field x"),
    ({"stream": True, "beam_width": 2}, "beam_width", "beam search knows its texts only at the end"),
    ({"beam_width": 2, "top_k": 4}, "beam_width", "without options of sampling"),
    ({"length_penalty": 2}, "length_penalty", "without beam search"),
    ({"top_p_decay": 0.9}, "top_p_decay", "without top_p"),
    ({"top_p": 0.5, "top_p_decay": 0.9, "top_p_bound": 0.6}, "top_p_bound", "between 0 and top_p"),
    ({"user": 5}, "user", "a valid string"),
    ({"suffix": "end"}, "suffix", "does not support"),
    ({"tools": [{}]}, "tools", "does not support"),
    ({"response_format": {"type": "json_object"}}, "response_format", "does not support"),
    ({"logprobs": 1, "modalities": ["audio"]}, "modalities", "does not support"),
    ({"\ud800": 1}, None, "half a character"),
    ({"logit_bias": {"\ud800": 1}}, "logit_bias", "token numbers"),
    ({"stream": True, "stream_options": {"\ud800": 1}}, None, "half a character"),
    ({"x" * 4000: 1}, "x" * 60, "unknown field"),
    ({"beam_width": 2, "length_penalty": 50}, "length_penalty", "less than or equal to 30"),
]  # fmt: skip
ASK_FOR_NOTHING = {
    "tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "suffix": None,
    "metadata": {"a": "b"}, "service_tier": "auto", "user": "me", "stop": None, "logprobs": None, "n": None,
    "max_tokens": None, "logit_bias": None, "stream_options": None, "echo": None, "best_of": None, "seed": None,
}  # fmt: skip


def test_every_wrong_field_is_named(served):
    for fields, name, words in WRONG:
        status, got = post(served[0], {"prompt": "a", **fields})
        assert (status, got["error"]["param"]) == (400, name), (fields, got)
        assert words in got["error"]["message"] and got["message"] == got["error"]["message"], (fields, got)
        assert got["error"]["type"] == "invalid_request_error"
        assert len(got["message"]) < 400 and "--" not in got["message"]
    assert post(served[0], {"prompt": "a", "max_tokens": 500})[1]["error"]["code"] == "context_length_exceeded"


def test_fields_that_ask_for_nothing_are_taken(served):
    assert post(served[0], {"prompt": "a", **ASK_FOR_NOTHING})[0] == 200


def test_another_model_is_not_found(served):
    status, got = post(served[0], {"prompt": "a", "model": "gpt-4"})
    assert status == 404 and got["error"]["code"] == "model_not_found" and got["error"]["param"] == "model"
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", top_p=2)
    assert caught.value.param == "top_p"


def test_bodies_that_are_no_object(served):
    for body in (b"", b"{", b"[]", b"5", b"null", b'"a"', b"\xff", b'{"seed": 1' + b"0" * 5000 + b"}", b"[" * 100_000):
        status, got = post(served[0], body)
        assert status == 400 and got["error"]["message"] and "Traceback" not in got["message"], body[:20]
    status, got = post(served[0], b"{}", **{"Content-Type": "text/plain"})
    assert status == 400 and "Content-Type: application/json" in got["message"]


def test_unknown_paths_and_methods_have_the_same_form(served):
    assert post(served[0], {}, "/v1/nothing") == (404, {
        "message": "there is no /v1/nothing; /openapi.json lists what there is.",
        "error": {
            "message": "there is no /v1/nothing; /openapi.json lists what there is.",
            "type": "invalid_request_error", "param": None, "code": None,
        },
    })  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{served[0]}/v1/completions", timeout=10)
    assert caught.value.code == 405 and caught.value.headers["Allow"] == "POST"
    assert "does not know GET" in json.load(caught.value)["message"]


def test_mistake_of_the_server_is_a_500_without_its_details(served, monkeypatch):
    def broken(*_):
        raise KeyError("secret")

    monkeypatch.setattr(served[1], "submit", broken)
    status, got = post(served[0], {"prompt": "a"})
    assert status == 500 and got["error"]["type"] == "server_error" and "secret" not in got["message"]
