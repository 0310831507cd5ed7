"""Wrong tokens, other sites' pages, tricked names: refused before a route runs, and logged without the secret."""

import json
import logging
import os

import pytest

from megalith.common.errors import ConfigError
from megalith.serving.options import ServeOptions
from tests.serving.conftest import serving
from tests.serving.plain_http import call

TOKEN, BODY = "s3cret-of-this-test", {"prompts": ["Once"], "tokens_to_generate": 2}


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


def test_token(make, token_file, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(make(), token_file=str(token_file)) as (url, service):
        for given in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": f"Basic {TOKEN}"},
            {"api_key": TOKEN},
        ):
            status, headers, body = call(url, "PUT", "/api?key=hidden", BODY, **given)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert "Authorization: Bearer" in json.loads(body)["message"] and TOKEN not in str(body)
        for path in ("/metrics", "/openapi.json", "/v1/models", "/nothing", "/page"):
            assert call(url, "GET", path)[0] == 401, path
        assert call(url, "POST", "/health", BODY)[0] == 401  # only what needs no token is free, and only to read
        assert service.unfinished == 0 and service.metrics.texts._value.get() == 0
        assert call(url, "GET", "/health")[0] == 200 and call(url, "GET", "/page/none.css")[0] == 404
        for scheme in ("Bearer", "bearer"):
            assert call(url, "PUT", "/api", BODY, Authorization=f"{scheme} {TOKEN}")[0] == 200
    lines = [record for record in caplog.records if record.name == "megalith.serving"]
    assert any(line.levelname == "WARNING" and "127.0.0.1 PUT /api 401" in line.getMessage() for line in lines)
    everything = "".join(record.getMessage() for record in caplog.records)
    assert TOKEN not in everything and "hidden" not in everything and "Once" not in everything


@pytest.mark.parametrize(
    "content, mode, words",
    [
        (TOKEN, 0o640, "chmod 600"), (TOKEN, 0o604, "chmod 600"), ("", 0o600, "one line"), (" \n", 0o600, "one line"),
        ("two\nlines", 0o600, "one line"), ("two words", 0o600, "one line"), ("größe", 0o600, "ASCII"),
    ],
)  # fmt: skip
def test_token_files_that_are_refused(token_file, content, mode, words):
    token_file.write_text(content)
    token_file.chmod(mode)
    with pytest.raises(ConfigError, match=words) as error:
        ServeOptions(token_file=str(token_file))
    assert "--token-file" in str(error.value) and TOKEN not in str(error.value)


def test_a_token_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="must name a file that exists"):
        ServeOptions(token_file=os.fspath(tmp_path / "none"))


@pytest.mark.parametrize("origin", ["https://a.example/", "https://A.example", "a.example", "https://a.example/page"])
def test_origins_that_no_browser_sends(origin):
    with pytest.raises(ConfigError, match="--allow-origins"):
        ServeOptions(allow_origins=(origin,))


def test_pages_of_other_sites(served, caplog):
    url, service = served
    own = url.partition("://")[2]
    # A simple POST, which browsers send without a preflight; it must not reach the model.
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"http://{own}.evil.example"):
        status, headers, body = call(url, "POST", "/api", BODY, Origin=origin, Content_Type="text/plain")
        assert status == 403 and "--allow-origins" in json.loads(body)["error"]["message"], origin
        assert "Access-Control-Allow-Origin" not in headers
        preflight = {"Origin": origin, "Access-Control-Request-Method": "PUT"}
        status, headers, _ = call(url, "OPTIONS", "/api", **preflight)
        assert status == 403 and "Access-Control-Allow-Origin" not in headers
    assert call(url, "PUT", "/api", BODY, Origin=url)[0] == 200
    assert service.metrics.texts._value.get() == 1
    refused = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(refused) == 8 and all("127.0.0.1 POST /api 403" in line for line in refused[::2])
    assert "Once" not in caplog.text and "evil.example" not in caplog.text


def test_allowed_origins(make, token_file):
    origin = "https://notes.example"
    with serving(make(), allow_origins=(origin,), token_file=str(token_file)) as (url, _):
        preflight = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization"}
        status, headers, _ = call(url, "OPTIONS", "/api", Origin=origin, **preflight)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, origin)
        assert headers["Access-Control-Allow-Headers"] == "authorization"
        status, headers, _ = call(url, "PUT", "/api", BODY, Origin=origin)
        assert (status, headers["Access-Control-Allow-Origin"]) == (401, origin)  # so that its page can read why
        status, headers, _ = call(url, "PUT", "/api", BODY, Origin=origin, Authorization=f"Bearer {TOKEN}")
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, origin)
        assert call(url, "OPTIONS", "/api", Origin="https://other.example", **preflight)[0] == 403
        assert call(url, "GET", "/health", Host="notes.example")[0] == 200  # as a proxy of that name passes it on


def test_names_that_lead_to_loopback(served):
    url, _ = served
    port = url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert call(url, "GET", "/health", Host=host)[0] == 200, host
    for host in (f"evil.example:{port}", "localhost.evil.example", "["):
        status, _, body = call(url, "GET", "/health", Host=host)
        assert status == 403 and "only for its own machine" in json.loads(body)["message"], host


def test_beyond_loopback_any_name_is_right(make):
    with serving(make(), host="0.0.0.0") as (url, _):  # as the options say; the test's socket is on loopback
        assert call(url, "GET", "/health", Host="gpu7.cluster.example")[0] == 200
        assert call(url, "PUT", "/api", BODY, Origin="https://evil.example")[0] == 403


def test_headers_for_browsers(served):
    url, _ = served
    for path, expected in (("/health", 200), ("/nothing", 404), ("/api", 405)):
        status, headers, _ = call(url, "GET", path)
        assert status == expected and "default-src 'self'" in headers["Content-Security-Policy"]
        assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
