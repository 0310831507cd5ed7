"""What /metrics shows, in the text format of Prometheus. Times are in seconds, sizes in bytes."""

from __future__ import annotations

import collections
import math
import time
from typing import TYPE_CHECKING

from megalith.common.extras import require

if TYPE_CHECKING:
    from megalith.serving.service import Service

RECENT_SECONDS = 10  # over which the rate of new tokens is measured
RECENT_TEXTS = 32  # of which the time that a text takes is measured
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REQUEST = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LONGEST_RETRY = 60  # seconds; later than that nobody knows


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(self):
        self.prometheus = prometheus = require("prometheus_client", "megalith serve")
        self.registry = registry = prometheus.CollectorRegistry()

        def counter(name: str, help: str, labels: tuple[str, ...] = ()):
            return prometheus.Counter(f"megalith_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()):
            return prometheus.Histogram(f"megalith_{name}", help, labels, buckets=buckets, registry=registry)

        self.requests = counter(
            "requests", "Ended requests; 429: refused by --max-waiting, 499: the client left before its end",
            ("route", "status"),
        )  # fmt: skip
        self.request_seconds = histogram("request_seconds", "From a request's start to its end", REQUEST, ("route",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were given to the model")
        self.new_tokens = counter("new_tokens", "Tokens that the model has written")
        self.texts = counter("texts", "Texts that were completed")
        self.cancelled_texts = counter("cancelled_texts", "Texts that were given up: their client left, or by an error")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request to the first token of each of its texts", FIRST_TOKEN
        )
        self.between_tokens = histogram(
            "time_between_tokens_seconds", "From a token of a text to its next", BETWEEN_TOKENS
        )
        self.by_second = collections.deque[list](maxlen=RECENT_SECONDS + 1)  # [second, new tokens] of the last ones
        self.durations = collections.deque[float](maxlen=RECENT_TEXTS)

    def watch(self, service: Service) -> None:
        """Show the state of a service too, as it is when somebody asks."""
        for name, help, value in (
            ("texts_running", "Texts that are being read or written", lambda: service.running),
            ("texts_waiting", "Texts that wait for their turn", lambda: service.waiting),
            ("up", "1 while requests are taken; 0 while the server ends, or when the model is lost",
             lambda: service.trouble is None),
            ("seconds_since_step", "Age of the engine's last sign of life", service.thread.seconds_since_sign),
            ("new_tokens_per_second", f"New tokens in each of the last {RECENT_SECONDS} seconds", self.rate),
            ("cache_used_bytes", "Keys and values that texts have reserved, on process 0",
             lambda: service.local_engine.bytes_in_use),
            ("cache_allocated_bytes", "Memory for keys and values, on process 0",
             lambda: service.local_engine.bytes_allocated),
        ):  # fmt: skip
            self.prometheus.Gauge(f"megalith_{name}", help, registry=self.registry).set_function(value)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request has ended. route: the pattern of its path."""
        self.requests.labels(route, status).inc()
        self.request_seconds.labels(route).observe(seconds)

    def prompt(self, tokens: int) -> None:
        """Prompts of so many tokens were given to the model."""
        self.prompt_tokens.inc(tokens)

    def tokens(self, tokens: int) -> None:
        """So many tokens were written."""
        self.new_tokens.inc(tokens)
        second = int(time.monotonic())
        if not self.by_second or self.by_second[-1][0] != second:
            self.by_second.append([second, 0])
        self.by_second[-1][1] += tokens

    def token(self, seconds: float, first: bool) -> None:
        """A token has come, so long after its request (first) or after the token before it."""
        (self.first_token if first else self.between_tokens).observe(seconds)
        self.tokens(1)

    def finished(self, seconds: float) -> None:
        """A text is complete, so long after its request."""
        self.texts.inc()
        self.durations.append(seconds)

    def cancelled(self, texts: int) -> None:
        """So many texts were given up: their client left, or they took too long."""
        self.cancelled_texts.inc(texts)

    def rate(self) -> float:
        """New tokens per second, over the last whole seconds."""
        now = int(time.monotonic())
        recent = [count for second, count in self.by_second if now - RECENT_SECONDS <= second < now]
        return sum(recent) / RECENT_SECONDS

    def seconds_per_text(self, unfinished: int) -> int:
        """After how many whole seconds, at least 1, a place in the queue should be free.

        By Little's law: where so many texts are unfinished, one ends every duration / unfinished seconds.
        """
        if not self.durations:
            return 1
        mean = sum(self.durations) / len(self.durations)
        return min(max(1, math.ceil(mean / max(1, unfinished))), LONGEST_RETRY)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return self.prometheus.generate_latest(self.registry)
