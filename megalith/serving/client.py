"""A client of a text server, on the standard library alone: OpenAI's streams and Megatron's PUT /api. No torch."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from megalith.common.errors import ConfigError, MegalithError, problem

PORT = 5000  # where a host is named without one
ATTEMPTS = 5  # at a server that is busy
LONGEST_WAIT = 60  # seconds between two attempts
NEVER = -100.0  # for a bias of -inf, which JSON does not have: the lowest of OpenAI, whose clients ban tokens by it
OPENAI_NAMES = {  # options that /v1 has, which streams; PUT /api has all
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_at_eod": "ignore_eos",
    **{name: name for name in (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "logit_bias", "seed", "stop", "stop_token_ids", "add_bos",
    )},
}  # fmt: skip


class ServerError(MegalithError):
    """A server that cannot be reached, or that did not answer with a text."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the token to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Client:
    """One server. Its methods raise ServerError with what went wrong, in words."""

    def __init__(self, host: str, token: str | None = None, timeout: float = 600.0):
        """host: name or name:port, or a URL. timeout: seconds without a sign of the server. ConfigError for no host."""
        self.url, self.timeout = _base_url(host), timeout
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        handlers: list[Any] = [_NoRedirect()]
        if _is_this_machine(urllib.parse.urlsplit(self.url).hostname):
            handlers.append(urllib.request.ProxyHandler({}))  # no proxy leads there
        self.opener = urllib.request.build_opener(*handlers)

    def texts(self, prompt: str, options: dict[str, Any]) -> list[str]:
        """The texts of PUT /api for a prompt, all at once. options: of GenerationParams, by name."""
        with self._open("PUT", "/api", {"prompts": [prompt], **_megatron(prompt, options)}) as answer, self._reading():
            return json.load(answer)["text"]

    def complete(self, prompt: str, options: dict[str, Any]) -> Generator[str]:
        """The continuation of a prompt, in pieces as they come. options: those of OPENAI_NAMES."""
        body = {"prompt": prompt, **_openai(options)}
        return self._stream("/v1/completions", body, lambda choice: choice["text"])

    def chat(self, messages: Sequence[dict[str, str]], options: dict[str, Any]) -> Generator[str]:
        """The answer to a conversation of {"role": ..., "content": ...}, in pieces as they come."""
        body = {"messages": list(messages), **_openai(options)}
        return self._stream("/v1/chat/completions", body, lambda choice: choice["delta"].get("content") or "")

    def _stream(self, path: str, body: dict[str, Any], text: Callable[[Any], str]) -> Generator[str]:
        """The text of each event's first choice. Closing the generator closes the connection, and the server stops."""
        with self._open("POST", path, {**body, "stream": True}) as answer, self._reading():
            for line in answer:
                name, _, data = line.decode().partition(":")
                if not line.endswith(b"\n"):  # cut off
                    break
                if name != "data":  # an empty line, or a comment that keeps the connection open
                    continue
                if data.strip() == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"{self.url} ended the text: {event['error']['message']}")
                yield from map(text, event["choices"][:1])
        raise ServerError(f"{self.url} closed the connection before the text was complete.")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"contact with {self.url} was lost: {_reason(error)}.") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, MegalithError):
                raise
            raise ServerError(f"{self.url} does not answer as a text server: {_reason(error)}.") from None

    def _open(self, method: str, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """A response with status 200; a busy server is asked again."""
        data = json.dumps(body).encode()
        attempt = 1
        while True:
            request = urllib.request.Request(self.url + path, data, self.headers, method=method)
            try:
                return self.opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code != 429 or attempt == ATTEMPTS:
                        raise ServerError(self._refusal(error)) from None
                    seconds = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                cure = "Is the server running (megalith serve PATH), and are host and port right?"
                raise ServerError(f"{self.url} cannot be reached: {_reason(error)}. {cure}") from None
            print(f"megalith: the server is busy; asking again in {seconds:g} s", file=sys.stderr, flush=True)
            time.sleep(seconds)
            attempt += 1

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """What an answer with an error says, in words."""
        said = error.reason
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            answer = json.load(error)
            said = answer["message"] if "message" in answer else answer["error"]["message"]
        what = {
            401: "wants a token, or another one: give --token-file FILE", 429: "is still busy",
            503: "cannot answer now", 504: "took too long",
        }.get(error.code, f"refused with status {error.code}")  # fmt: skip
        return f"{self.url} {what}: {said}"


def _base_url(host: str) -> str:
    """http://host:port of what a user typed."""
    try:
        parts = urllib.parse.urlsplit(host if "://" in host else f"http://{host}")
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or not host.isprintable() or " " in host:
        raise ConfigError(problem("HOST", host, "must be a host, host:port or URL", "Write localhost:5000"))
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = port or (None if "://" in host else PORT)
    return f"{parts.scheme}://{name}" + (f":{port}" if port else "")


def _is_this_machine(host: str | None) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host or "").is_loopback
    return host == "localhost"


def _reason(error: BaseException) -> str:
    """An error in a few words."""
    error = getattr(error, "reason", error) if isinstance(getattr(error, "reason", None), BaseException) else error
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _seconds(text: str | None) -> float:
    """How long to wait, as Retry-After says it; 1 s where it does not, or not in seconds."""
    return min(max(int(text), 1), LONGEST_WAIT) if text is not None and text.isdecimal() else 1


def _openai(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a text as /v1 has them."""
    found = {OPENAI_NAMES[name]: value for name, value in _for_json(options).items()}
    if "ignore_eos" in found:
        found["ignore_eos"] = not found["ignore_eos"]
    if found.get("top_p") == 0.0:  # off here, and the likeliest token alone there
        found["top_p"] = 1.0
    return found


def _megatron(prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a text as PUT /api has them."""
    found = _for_json(options)
    if found.get("temperature") == 0.0:  # Megatron's greedy is top_k
        filters = ("temperature", "top_k", "top_p", "top_p_decay", "top_p_bound")
        found = {name: value for name, value in found.items() if name not in filters} | {"top_k": 1}
    return found if prompt else {**found, "add_bos": True}  # Megatron refuses an empty prompt without it


def _for_json(options: dict[str, Any]) -> dict[str, Any]:
    bias = options.get("logit_bias")
    return options | ({"logit_bias": {token: max(value, NEVER) for token, value in bias.items()}} if bias else {})
