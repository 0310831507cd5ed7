"""What /health and /metrics say is what was done, and they say it while the engine works."""

import json
import re
import time
import types

import pytest

from megalith.serving import metrics
from megalith.serving.metrics import LONGEST_RETRY, Metrics
from tests.serving.conftest import serving
from tests.serving.plain_http import call, connect, held, raw, until

JSON = "Content-Type: application/json"


def shown(url):
    """Name with labels -> number."""
    status, headers, body = call(url, "GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_counts(served):
    url, service = served
    prompts = ["Once upon a time", "a"]
    tokens = [len(service.model.tokenizer.encode(prompt)) for prompt in prompts]
    assert call(url, "PUT", "/api", {"prompts": ["b"], "tokens_to_generate": 3})[0] == 200
    before = shown(url)
    assert call(url, "PUT", "/api", {"prompts": prompts, "tokens_to_generate": 5})[0] == 200
    after = shown(url)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    new = grown["megalith_new_tokens_total"]
    assert 2 <= new <= 10  # fewer than 10 where the model ends a text
    assert grown["megalith_prompt_tokens_total"] == sum(tokens)
    assert grown["megalith_texts_total"] == grown["megalith_time_to_first_token_seconds_count"] == 2
    assert grown["megalith_time_between_tokens_seconds_count"] == new - 2
    assert grown['megalith_requests_total{route="/api",status="200"}'] == 1
    assert grown['megalith_request_seconds_count{route="/api"}'] == 1
    assert after["megalith_up"] == 1 and after["megalith_texts_running"] == after["megalith_texts_waiting"] == 0
    assert after["megalith_cache_allocated_bytes"] == service.local_engine.bytes_allocated > 0
    assert all(re.match("megalith_[a-z_]+", name) for name in after)


def test_a_stream_that_its_client_leaves_is_not_counted_as_done(served):
    url, service = served
    with held(service), connect(url) as client:
        client.sendall(raw("POST", "/v1/completions", b'{"prompt": "Once", "stream": true}', JSON))
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.close()
        until(lambda: shown(url).get('megalith_requests_total{route="/v1/completions",status="499"}') == 1)
    assert 'megalith_requests_total{route="/v1/completions",status="200"}' not in shown(url)


def test_every_path_is_not_a_series(served):
    url, _ = served
    for path in ("/a", "/b", "/c"):
        assert call(url, "GET", path)[0] == 404
    assert call(url, "GET", "/api")[0] == 405
    series = {name: value for name, value in shown(url).items() if name.startswith("megalith_requests_total")}
    assert series['megalith_requests_total{route="other",status="404"}'] == 3
    assert series['megalith_requests_total{route="/api",status="405"}'] == 1


def test_both_answer_while_the_engine_works(make):
    body = json.dumps({"prompts": ["Once", "upon", "a"], "tokens_to_generate": 9}).encode()
    with serving(make(), max_batch_size=2) as (url, service):
        with held(service):
            client = connect(url)
            client.sendall(raw("PUT", "/api", body))
            until(lambda: service.unfinished == 3)
            started = time.monotonic()
            status, _, body = call(url, "GET", "/health")
            state, now = json.loads(body), shown(url)
            assert time.monotonic() - started < 1.0
            assert (status, state["status"], state["model"]) == (200, "ok", "tiny")
            assert (state["running"], state["waiting"]) == (2, 1)
            assert (now["megalith_texts_running"], now["megalith_texts_waiting"]) == (2, 1)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_health_says_why_not(make):
    with serving(make(), stall_timeout=1.0) as (url, service):
        service.draining = True
        status, _, body = call(url, "GET", "/health")
        assert (status, json.loads(body)["reason"]) == (503, "the server is ending")
        service.draining = False
        assert call(url, "GET", "/health")[0] == 200
        with held(service), connect(url) as client:
            client.sendall(raw("PUT", "/api", b'{"prompts": ["a"]}'))
            assert client.recv(1000).startswith(b"HTTP/1.1 503")  # and not a hang
            status, _, body = call(url, "GET", "/health")
            state = json.loads(body)
            assert (status, state["status"]) == (503, "unavailable") and "--stall-timeout" in state["reason"]
            status, headers, _ = call(url, "PUT", "/api", {"prompts": ["a"]})
            assert status == 503 and int(headers["Retry-After"]) >= 1
            assert shown(url)["megalith_up"] == 0
    with serving(make()) as (url, service):  # a model that hung once is lost for good
        assert call(url, "GET", "/health")[0] == 200
        service.draining = True
        assert json.loads(call(url, "GET", "/health")[2])["reason"] == "the server is ending"
        service.draining = False
        service.fail("rank 1 is lost")
        until(lambda: service.failure is not None)
        status, _, body = call(url, "GET", "/health")
        assert (status, json.loads(body)["reason"]) == (503, "rank 1 is lost")


@pytest.mark.parametrize(
    "durations, unfinished, seconds",
    [([], 9, 1), ([8.0, 12.0], 4, 3), ([0.1], 100, 1), ([600.0], 2, LONGEST_RETRY), ([5.0], 0, 5)],
)
def test_when_to_try_again(durations, unfinished, seconds):
    measured = Metrics()
    for each in durations:
        measured.finished(each)
    assert measured.seconds_per_text(unfinished) == seconds


def test_rate(monkeypatch):
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    measured = Metrics()
    for clock.now in (1000.0, 1000.9, 1001.5):
        measured.tokens(10)
    assert measured.rate() == 2.0  # of whole seconds
    for clock.now, rate in ((1002.0, 3.0), (1011.0, 1.0), (1020.0, 0.0)):
        assert measured.rate() == rate
