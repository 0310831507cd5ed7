"""PUT /api over a live server: texts are those of `complete`, and each check of its fields answers with status 400."""

import json
import pathlib
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.generation.generate import complete, score
from megalith.generation.params import GenerationParams
from megalith.serving.megatron.fields import FIELDS, body_schema
from tests.serving.conftest import serving

SEED = pathlib.Path(__file__).parents[3] / "shared" / "seeds" / "001_9d32dca528cf1dc8.txt"


def send(url: str, body: Any, method: str = "PUT") -> tuple[int, dict[str, Any]]:
    """Status and answer. body: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/api", data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


LIKE_THE_LIBRARY = [  # fields of a body, and the options that mean the same
    ({"top_k": 1}, {"top_k": 1}),
    ({"top_k": 1, "logprobs": True, "add_BOS": True}, {"top_k": 1, "logprobs": True, "add_bos": True}),
    ({"random_seed": 3}, {}),
    ({"random_seed": 3, "temperature": 2, "top_k": 20}, {"temperature": 2.0, "top_k": 20}),
    ({"random_seed": 3, "top_p": 0.9, "top_p_decay": 0.9, "top_p_bound": 0.3},
     {"top_p": 0.9, "top_p_decay": 0.9, "top_p_bound": 0.3}),
    ({"seed": 3, "top_p": 1}, {"top_p": 1.0}),
    ({"random_seed": 3, "stop_on_eol": True}, {"stop_on_eol": True}),
    ({"random_seed": 3, "stop_on_double_eol": True}, {"stop_on_double_eol": True}),
    ({"random_seed": 3, "prevent_newline_after_colon": True}, {"prevent_newline_after_colon": True}),
    ({"random_seed": 3, "num_samples": 3, "min_p": 0.1, "echo": False, "no_log": True},
     {"num_samples": 3, "min_p": 0.1, "echo": False}),
    ({"random_seed": 3, "stop": "e", "repetition_penalty": 1.3, "stop_token_ids": [7]},
     {"stop": "e", "repetition_penalty": 1.3, "stop_token_ids": [7]}),
    ({"random_seed": 3, "presence_penalty": 1.5, "frequency_penalty": -1, "min_new_tokens": 9, "stop_at_eod": False},
     {"presence_penalty": 1.5, "frequency_penalty": -1.0, "min_new_tokens": 9, "stop_at_eod": False}),
    ({"random_seed": 3, "logit_bias": {"70": 5, "71": -100.0}, "max_new_tokens": 4},
     {"logit_bias": {70: 5.0, 71: -100.0}, "max_new_tokens": 4}),
]  # fmt: skip


def test_texts_are_those_of_the_library(served) -> None:
    url, service = served
    prompts = ["Once upon", "Zürich: 東京"]
    for fields, options in LIKE_THE_LIBRARY:
        new = {} if "max_new_tokens" in fields else {"tokens_to_generate": 9}
        status, got = send(url, {"prompts": prompts, **new, **fields}, "POST" if "seed" in fields else "PUT")
        assert status == 200, got
        expected = complete(
            service.model, prompts, prompt_logprobs="logprobs" in fields,
            **{"max_new_tokens": 9, "seed": 3, **options},
        )  # fmt: skip
        assert got["text"] == [each.text for each in expected], fields
        assert [len(row) for row in got["segments"]] == [len(each.prompt_ids + each.ids) for each in expected]
        probabilities = [each.prompt_logprobs + each.logprobs for each in expected] if "logprobs" in fields else None
        assert got["logprobs"] == probabilities and set(got) == {"text", "segments", "logprobs"}


def test_without_new_tokens_prompts_are_scored(served) -> None:
    url, service = served
    prompts = ["Once upon a time", "Zürich"]
    status, got = send(url, {"prompts": prompts, "tokens_to_generate": 0, "logprobs": True, "top_logprobs": 2})
    assert status == 200 and got["text"] == prompts
    assert got["logprobs"] == score(service.model, prompts)
    assert [len(row) - 1 for row in got["segments"]] == [len(row) for row in got["top_logprobs"]]
    expected = complete(service.model, prompts, max_new_tokens=0, prompt_logprobs=True, top_logprobs=2)
    assert [[[logprob for _, logprob in place] for place in row] for row in got["top_logprobs"]] == [
        [[logprob for _, logprob in place] for place in each.prompt_top_logprobs] for each in expected
    ]


def test_segments_are_the_text_in_pieces(served) -> None:
    url, service = served
    status, got = send(url, {"prompts": ["Once upon a time", ""], "tokens_to_generate": 4, "add_BOS": True, "top_k": 1})
    assert status == 200
    for text, row in zip(got["text"], got["segments"]):
        assert row[0] == "<|endoftext|>" and "".join(row[1:]).replace("\ufffd", "") == text.replace("\ufffd", "")
    _, got = send(url, {"prompts": ["\x01ü"], "tokens_to_generate": 0, "logprobs": True})
    tokens = service.model.tokenizer.encode("\x01ü")
    assert got["segments"] == [["\x01", *(["ü"] if len(tokens) == 2 else ["\ufffd", "\ufffd"])]]


def test_beams_are_those_of_the_library(served) -> None:
    url, service = served
    body = {"prompts": ["Once upon"], "tokens_to_generate": 6, "beam_width": 3, "length_penalty": 2, "stop_token": 40}
    status, got = send(url, body)
    assert status == 200, got
    expected = complete(
        service.model, "Once upon", max_new_tokens=6, beam_width=3, num_samples=3, length_penalty=2.0,
        stop_token_ids=[40], stop_at_eod=False,
    )  # fmt: skip
    assert set(got) == {"text", "segments", "scores"}
    assert got["text"] == [each.text for each in expected] and got["scores"] == [each.score for each in expected]


def test_the_server_has_defaults(make) -> None:
    model = make()
    with serving(model, temperature=0.5, top_p=0.7) as (url, _):
        for fields, options in (
            ({}, {"temperature": 0.5, "top_p": 0.7}),
            ({"top_k": 0}, {"temperature": 0.5}),
            ({"temperature": 1, "top_k": 5}, {"top_k": 5}),
            ({"top_p": 0.2, "top_p_decay": 0.5}, {"temperature": 0.5, "top_p": 0.2, "top_p_decay": 0.5}),
        ):
            _, got = send(url, {"prompts": ["Once"], "random_seed": 1, **fields})
            assert got["text"] == [each.text for each in complete(model, "Once", seed=1, **options)]  # 64 new tokens


ONE = {"prompts": ["a"]}
WRONG: list[tuple[Any, str]] = [  # a body, and a part of its answer; each line of specs.md 7.1
    ({}, "prompts must be given"),
    ({"prompts": "a"}, "prompts must be a list of strings; found 'a'"),
    ({"prompts": [1]}, "prompts must be a list of strings"),
    ({"prompts": []}, "prompts must be at least 1 text, and at most 128; found 0"),
    ({"prompts": ["a"] * 129}, "at most 128; found 129"),
    (ONE | {"max_len": 3}, "max_len is no longer used: write tokens_to_generate"),
    (ONE | {"sentences": ["a"]}, "sentences is no longer used: write prompts"),
    (ONE | {"beam_width": "2"}, "beam_width must be an integer"),
    (ONE | {"beam_width": 0}, "beam_width must be an integer from 1"),
    ({"prompts": ["a", "b"], "beam_width": 2}, "prompts must be one for beam search; found 2"),
    (ONE | {"beam_width": 2, "top_k": 3}, "beam_width must be given without options of sampling"),
    (ONE | {"beam_width": 2, "logprobs": True}, "logprobs must be false for beam search"),
    (ONE | {"beam_width": 2, "num_samples": 3}, "num_samples must be at most beam_width, 2"),
    (ONE | {"tokens_to_generate": 1.5}, "tokens_to_generate must be an integer greater than or equal to 0"),
    (ONE | {"tokens_to_generate": -1}, "tokens_to_generate must be an integer greater than or equal to 0; found -1"),
    (ONE | {"tokens_to_generate": True}, "tokens_to_generate must be an integer"),
    (ONE | {"tokens_to_generate": None}, "tokens_to_generate must be an integer"),
    (ONE | {"tokens_to_generate": 10**30}, "tokens_to_generate must be an integer"),
    (ONE | {"tokens_to_generate": 2**63}, "the model's limit (max_position_embeddings) is 200"),
    (ONE | {"tokens_to_generate": 200}, "the prompt has 1 tokens and 200 new ones are asked for, together 201"),
    (ONE | {"logprobs": 1}, "logprobs must be a boolean value"),
    (ONE | {"tokens_to_generate": 0}, "logprobs must be true with tokens_to_generate 0"),
    (ONE | {"temperature": "1"}, "temperature must be a positive number less than or equal to 100.0"),
    (ONE | {"temperature": 0}, "temperature must be a positive number"),
    (ONE | {"temperature": 100.5}, "less than or equal to 100.0; found 100.5"),
    (ONE | {"top_k": 1.0}, "top_k must be an integer equal to or greater than 0 and less than or equal to 1000"),
    (ONE | {"top_k": 1001}, "top_k must be an integer"),
    (ONE | {"top_p": True}, "top_p must be a positive number less than or equal to 1.0"),
    (ONE | {"top_p": 1.1}, "top_p must be"),
    (ONE | {"top_p": 0.5, "top_k": 2}, "top_p must be left out or 0 with top_k"),
    (ONE | {"top_p": 0.5, "top_p_decay": 2}, "top_p_decay must be a number from 0"),
    (ONE | {"top_p_decay": 0.5}, "top_p_decay cannot be set without top_p"),
    (ONE | {"top_p": 0.5, "top_p_bound": 0}, "top_p_bound must be a number greater than 0 and at most top_p"),
    (ONE | {"top_p": 0.5, "top_p_bound": 0.6}, "top_p_bound must be at most top_p, 0.5"),
    (ONE | {"top_p_bound": 0.5}, "top_p_bound must be at most top_p, 0.0"),
    (ONE | {"add_BOS": 1}, "add_BOS must be a boolean value"),
    ({"prompts": ["a", ""]}, "add_BOS must be true where a prompt is empty"),
    (ONE | {"stop_on_double_eol": "yes"}, "stop_on_double_eol must be a boolean value"),
    (ONE | {"stop_on_eol": None}, "stop_on_eol must be a boolean value"),
    (ONE | {"prevent_newline_after_colon": 0}, "prevent_newline_after_colon must be a boolean value"),
    (ONE | {"random_seed": 1.5}, "random_seed must be a positive integer"),
    (ONE | {"random_seed": -2}, "random_seed must be a positive integer, or -1"),
    (ONE | {"random_seed": 1, "seed": 2}, "random_seed and seed are two names of one option, and must agree"),
    (ONE | {"no_log": 1}, "no_log must be a boolean value"),
    (ONE | {"stop_token": "x"}, "stop_token must be an integer"),
    (ONE | {"stop_token": 10**6, "beam_width": 2}, "stop_token_ids must be among the 300 tokens"),
    (ONE | {"length_penalty": "1"}, "length_penalty must be a number"),
    (ONE | {"length_penalty": 31, "beam_width": 2}, "length_penalty must be a number from -30 to 30"),
    (b'{"prompts": ' + b"[" * 1000 + b"]" * 1000 + b"}", "prompts must be a list of strings"),
    (ONE | {"num_samples": 129}, "num_samples must be a whole number from 1 to 128"),
    ({"prompts": ["a", "b"], "num_samples": 65}, "prompts times num_samples must be at most 128; found 130"),
    (ONE | {"stop": ["a"] * 65}, "stop must be a text or a list of texts, at most 64"),
    (ONE | {"stop": "x" * 257}, "of at most 256 characters each"),
    (ONE | {"stop": [""]}, "stop must be texts of at least one character"),
    (ONE | {"stop_token_ids": [True]}, "stop_token_ids must be a list of token numbers"),
    (ONE | {"logit_bias": {"x": 1}}, "logit_bias must be numbers by token number"),
    (ONE | {"logit_bias": {"1": True}}, "logit_bias must be numbers by token number"),
    (ONE | {"min_p": 2}, "min_p must lie between 0 (off) and 1"),
    (ONE | {"stream": True}, "unknown field stream: texts are streamed by POST /v1/completions"),
    (ONE | {"temprature": 1, "top_k": -1}, "unknown field temprature: did you mean temperature?"),
    (ONE | {"temprature": 1, "top_k": -1}, "2. top_k must be"),
    (["a"], "The body must be a JSON object; found ['a']"),
    (b"", "The body must be JSON"),
    (b'{"prompts": ["a"], "temperature": NaN}', "The body must be JSON"),
    (b'{"prompts": ["a"], "temperature": 1e999}', "The body must be JSON"),
    (b'{"prompts": ["\\ud800"]}', "The body must be JSON"),
    (b"\xff\xfe", "The body must be JSON"),
    (b"[" * 5000, "The body must be JSON"),
    (b'{"prompts": ["a"], "top_k": ' + b"1" * 5000 + b"}", "The body must be JSON"),
    (dict.fromkeys(map(str, range(100_000)), 1), "9 problems"),
    ({"prompts": ["a" * 10000]}, "the model's limit (max_position_embeddings) is 200"),
]  # fmt: skip


def test_each_mistake_is_named_with_status_400(served) -> None:
    url, _ = served
    for body, message in WRONG:
        status, got = send(url, body)
        assert (status, message in got["message"]) == (400, True), (body, status, got["message"])
        assert got["error"]["message"] == got["message"] and "--" not in got["message"].replace("server's --", "")
        assert len(got["message"]) < 1500


def test_openapi_describes_every_field(served) -> None:
    url, _ = served
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as answer:
        methods = json.load(answer)["paths"]["/api"]
    for method in ("put", "post"):
        assert set(methods[method]["responses"]) == {"200", "4XX", "5XX"}
        schema = methods[method]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == {"prompts", *FIELDS} >= set(GenerationParams.__dataclass_fields__)
        assert all(each["description"] for each in schema["properties"].values())
    assert send(url, schema["example"])[0] == 200


@pytest.mark.skipif(
    not SEED.exists() or shutil.which("curl") is None, reason="needs the documents of ../shared, and curl"
)
def test_curl_as_the_documents_type_it(served) -> None:
    url, service = served
    line = next(line for line in SEED.read_text().splitlines() if line.startswith("curl "))
    command = [word.replace("http://localhost:5000", url) for word in shlex.split(line)]
    assert f"{url}/api" in command
    got = json.loads(subprocess.run([*command, "--silent"], check=True, capture_output=True, timeout=60).stdout)
    assert got["text"][0].startswith("Hello world") and len(got["segments"][0]) == 1 + len(
        service.model.tokenizer.encode("Hello world")
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([0, 1, -1, 0.5, 2**31, 2**63, 10**25, 1e308, "", "a"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5) | st.integers(0, 400).map(str), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
NAMES = sorted(body_schema()["properties"])
PLAUSIBLE = {  # by the type of a field; the other types are what JSON has
    "int": st.integers(-1, 5), "float": st.floats(0, 1) | st.integers(0, 1), "bool": st.booleans()
}  # fmt: skip
MINIMAL = st.fixed_dictionaries(
    {
        "prompts": st.lists(st.text("aZ ü東", min_size=1, max_size=5), min_size=1),
        "tokens_to_generate": st.integers(1, 3),
    }
)


def fields(values: Callable[[str], st.SearchStrategy]) -> st.SearchStrategy[dict[str, Any]]:
    """A few fields of a body, with values of these strategies by the field's name."""
    pairs = st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), values(name)))
    return st.lists(pairs, max_size=4).map(dict)


BODIES = st.one_of(
    st.builds(
        dict.__or__, fields(lambda name: PLAUSIBLE.get(FIELDS[name].kind, JSON) if name in FIELDS else JSON), MINIMAL
    ),
    st.builds(dict.__or__, MINIMAL, fields(lambda name: JSON)),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), JSON, max_size=4),
    JSON,
    st.binary(max_size=30),
)


@pytest.mark.slow
def test_no_body_breaks_the_server(served) -> None:
    url, service = served
    seen = {200: 0, 400: 0}

    @settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(BODIES)
    def check(body) -> None:
        status, got = send(url, body)
        assert status in seen, (status, got)
        seen[status] += 1

    check()
    assert min(seen.values()) > 50 and service.trouble is None and not service.unfinished
