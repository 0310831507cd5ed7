"""`megalith ask` with a live server, and with one that misbehaves in every way that a client can meet."""

import contextlib
import http.server
import io
import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from megalith.cli.main import main
from megalith.common.errors import ConfigError
from megalith.generation.generate import complete
from megalith.serving import client
from megalith.serving.client import Client, ServerError


def asked(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    """Status, output and errors of `megalith ask`."""
    capsys.readouterr()
    status = main(["ask", *map(str, words)])
    return status, *capsys.readouterr()


class Terminal(io.StringIO):
    """Standard input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_one_text_is_that_of_the_library(served, capsys, monkeypatch) -> None:
    url, service = served
    expected = complete(service.model, "Once", max_new_tokens=8, temperature=0.0)[0].continuation
    assert asked(capsys, url, "--prompt", "Once", "--greedy", "--max-new-tokens", 8) == (0, expected + "\n", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert asked(capsys, url, "--greedy", "--max-new-tokens", 8)[:2] == (0, expected + "\n")
    options = {"seed": 3, "max_new_tokens": 6, "top_k": 40, "stop": ("e",), "logit_bias": {70: 3.0, 71: -100.0}}
    words = ("--seed", 3, "--max-new-tokens", 6, "--top-k", 40, "--stop", "e", "--logit-bias", "70=3", "71=-inf")
    for more, added in (((), {}), (("--num-samples", 2, "--stop-on-eol"), {"num_samples": 2, "stop_on_eol": True})):
        texts = [each.continuation for each in complete(service.model, "Zürich", **options, **added)]
        status, out, _ = asked(capsys, url, "--prompt", "Zürich", *words, *more)
        assert status == 0 and out.removesuffix("\n") == f"\n{'-' * 40}\n".join(texts)
    greedy = [each.continuation for each in complete(service.model, "Once", max_new_tokens=5, temperature=0.0)]
    assert asked(capsys, url, "--prompt", "Once", "--greedy", "--stop-on-double-eol", "--max-new-tokens", 5)[1] == (
        greedy[0] + "\n"
    )


def test_as_megatrons_script(served, capsys, monkeypatch) -> None:
    url, service = served
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n4\nZ\nmany\n\n3\nlast"))
    status, out, errors = asked(capsys, url, "--megatron", "--greedy")
    first, second = (
        complete(service.model, prompt, max_new_tokens=new, temperature=0.0, add_bos=not prompt)[0].text
        for prompt, new in (("Once", 4), ("", 3))
    )
    question = "Enter prompt: Enter number of tokens to generate: "
    assert status == 0 and "whole number; found 'many'" in errors
    assert out == f"{question}Megatron Response: {first}\n{question}{question}Megatron Response: {second}\n{question}"


def test_a_conversation_goes_on_after_an_error(served, capsys, monkeypatch) -> None:
    url, service = served
    monkeypatch.setattr("sys.stdin", Terminal(f"Once\n\n{'a' * 5000}\nZ\n"))
    status, out, errors = asked(capsys, url, "--greedy", "--max-new-tokens", 4)
    first, second = (
        complete(service.model, prompt, max_new_tokens=4, temperature=0.0)[0].continuation for prompt in ("Once", "Z")
    )
    assert status == 0 and out == f"> {first}\n> > > {second}\n> \n"
    assert "Ctrl-D ends" in errors and "(max_position_embeddings) is 200" in errors


def test_an_interruption_at_the_question_does_not_end_the_conversation(served, capsys, monkeypatch) -> None:
    typed = iter([KeyboardInterrupt, "Once", EOFError])

    def line(question: str) -> str:
        word = next(typed)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", line)
    url, service = served
    status, out, errors = asked(capsys, url, "--greedy", "--max-new-tokens", 4)
    text = complete(service.model, "Once", max_new_tokens=4, temperature=0.0)[0].continuation
    assert (status, out) == (0, f"{text}\n\n") and "Ctrl-D ends" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chat", "--num-samples", 2), "--num-samples must be left out with --chat; found 2"),
        (("--chat", "--stop-on-eol"), "--stop-on-eol must be left out with --chat"),
        (("--chat", "--megatron"), "not allowed with"),
        (("--system", "Be kind"), "--system must be given with --chat"),
        (("--megatron", "--prompt", "a"), "--prompt must be left out with --megatron"),
        (("--top-p", 3), "--top-p must lie between"),
        (("--temprature", 1), "did you mean --temperature?"),
        (("--token-file", "none.txt"), "--token-file must name a file that exists"),
        (("--timeout", 0), "--timeout must be above 0"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_sent(words, message, capsys) -> None:
    status, _, errors = asked(capsys, "localhost:1", *words)
    assert status == 2 and message in errors


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("localhost", "http://localhost:5000"), ("host:80", "http://host:80"), ("[::1]:7", "http://[::1]:7"),
        ("https://host/api", "https://host"), ("http://host:1/", "http://host:1"),
    ],
)  # fmt: skip
def test_hosts(typed, url) -> None:
    assert Client(typed).url == url


@pytest.mark.parametrize("typed", ["", "ftp://host", "host:port", "host:99999", "a b", "http://", "[::1"])
def test_hosts_that_are_none(typed) -> None:
    with pytest.raises(ConfigError, match="HOST must be a host, host:port or URL"):
        Client(typed)


def test_neither_command_imports_torch_for_its_help() -> None:
    code = (
        "import sys, megalith.cli.ask, megalith.cli.serve; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@contextlib.contextmanager
def scripted(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, list[tuple[str, Any, Any]]]]:
    """A server that gives these answers, one a request: its URL, and (path, body, headers) of what was asked."""
    left, requests = list(answers), list[tuple[str, Any, Any]]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body, self.headers))
            status, headers, content = left.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_PUT = do_POST  # by the name that the base class looks for

        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def events(*contents: Any, end: bytes = b"data: [DONE]\n\n") -> tuple[int, dict[str, str], bytes]:
    """A streamed answer, with a comment that keeps the connection open."""
    body = b": still at work\n\n" + b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in contents) + end
    return 200, {"Content-Type": "text/event-stream"}, body


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def test_a_chat_sends_what_was_said(capsys, monkeypatch, tmp_path) -> None:
    secret = tmp_path / "token"
    secret.write_text("abc\n")
    role = {"choices": [{"delta": {"role": "assistant"}}]}
    usage = {"choices": [], "usage": {}}
    answers = (
        events(role, said("Hel"), said("lo"), usage),
        events(said("lost"), {"error": {"message": "the model is lost."}}, end=b""),
        events(said("Bye")),
    )
    monkeypatch.setattr("sys.stdin", Terminal("Hi\nWhat?\nAnd?\n"))
    with scripted(*answers) as (url, requests):
        status, out, errors = asked(
            capsys, url, "--chat", "--system", "Be kind", "--token-file", secret, "--greedy", "--ignore-eod"
        )
    assert status == 0 and out == "> Hello\n> lost\n> Bye\n> \n" and "ended the text: the model is lost." in errors
    assert {(path, headers["Authorization"]) for path, _, headers in requests} == {
        ("/v1/chat/completions", "Bearer abc")
    }
    messages = [("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello"), ("user", "What?"), ("assistant", "lost")]
    assert requests[2][1] == {
        "messages": [{"role": role, "content": text} for role, text in [*messages, ("user", "And?")]],
        "stream": True, "temperature": 0.0, "ignore_eos": True,
    }  # fmt: skip


def test_a_busy_server_is_asked_again(capsys, monkeypatch) -> None:
    waits = list[float]()
    monkeypatch.setattr(client.time, "sleep", waits.append)
    busy = b'{"message": "the server is busy."}'
    answers = [(429, {"Retry-After": seconds}, busy) for seconds in ("3", "1000", "soon")]
    with scripted(*answers, events({"choices": [{"text": "b"}]})) as (url, requests):
        status, out, errors = asked(capsys, url, "--prompt", "a")
    assert (status, out, waits, len(requests)) == (0, "b\n", [3, 60, 1], 4) and "asking again in 3 s" in errors
    with scripted(*[(429, {}, busy)] * 5) as (url, requests):
        status, _, errors = asked(capsys, url, "--prompt", "a")
    assert (status, len(requests)) == (1, 5) and "is still busy: the server is busy." in errors


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, b'{"message": "no token."}'), "wants a token, or another one: give --token-file FILE: no token."),
        ((503, {}, b'{"error": {"message": "rank 1 is lost."}}'), "cannot answer now: rank 1 is lost."),
        ((400, {}, b"[1]"), "refused with status 400: Bad Request"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "refused with status 302"),
        ((200, {}, b"<html>"), "closed the connection before the text was complete"),
        ((200, {}, b"data: {\n\n"), "does not answer as a text server"),
        ((200, {}, b'data: {"choices": [{}]}\n\n'), "does not answer as a text server"),
        (events(said("a"), end=b""), "does not answer as a text server"),
        (events({"choices": [{"text": "a"}]}, end=b""), "closed the connection before the text was complete"),
        ((200, {"Content-Length": "99"}, b"data: "), "closed the connection before"),
    ],
)
def test_what_went_wrong_is_said_in_words(answer, message, capsys) -> None:
    with scripted(answer) as (url, _):
        status, _, errors = asked(capsys, url, "--prompt", "a")
    assert status == 1 and message in errors and "Traceback" not in errors


def test_nobody_is_there(capsys) -> None:
    with scripted() as (url, _):
        pass
    status, _, errors = asked(capsys, url, "--prompt", "a")
    assert status == 1 and f"{url} cannot be reached: Connection refused. Is the server running" in errors
    with pytest.raises(ServerError, match="cannot be reached"):
        Client("name.invalid", timeout=5).texts("a", {})


def test_token_file(tmp_path: pathlib.Path, capsys) -> None:
    (tmp_path / "empty").write_text("\n")
    status, _, errors = asked(capsys, "localhost:1", "--token-file", tmp_path / "empty", "--prompt", "a")
    assert status == 2 and "must hold one line of ASCII characters" in errors
