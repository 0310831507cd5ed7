"""Every option of a server, each with its help: `megalith serve` has a flag for each. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterator

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import below_minimum, fail
from megalith.config.options import option
from megalith.serving.token_file import read_token

# Stop texts of a request, and characters of each: after every token the end of the text is compared with all their
# beginnings.
MOST_STOPS, LONGEST_STOP = 64, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, whom it answers, and how much it takes on. Raises ConfigError for what cannot work."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every network of this machine")
    port: int = option(5000, "port to listen on; 0 chooses a free one", minimum=0)
    model_name: str | None = option(None, "name of the model in /v1/models (default: that of its folder)")
    token_file: str | None = option(None, "file with the token that every request must bring (Authorization: Bearer)")
    allow_origins: tuple[str, ...] = option((), "origins of other sites whose pages may use this server; * for all")
    temperature: float = option(1.0, "temperature of requests that name none", minimum=0.0)
    top_k: int = option(0, "top_k of requests that name neither top_k nor top_p", minimum=0)
    top_p: float = option(0.0, "top_p of requests that name neither top_k nor top_p")
    max_batch_size: int = option(32, "texts that are written at one time; others wait", minimum=1)
    max_length: int | None = option(
        None, "most tokens of a prompt and its text together (default: the model's context)", minimum=1
    )
    max_cache_bytes: int | None = option(None, "most memory for keys and values on a process", minimum=1)
    max_waiting: int = option(256, "texts that may wait; requests beyond them get 429", minimum=0)
    max_body_bytes: int = option(4 * 2**20, "largest body of a request; larger ones get 413", minimum=1)
    request_timeout: float = option(600.0, "seconds that a request may take, in the queue too; then 504", minimum=0.0)
    drain_timeout: float = option(30.0, "seconds that running requests get to end after SIGTERM", minimum=0.0)
    stall_timeout: float = option(
        300.0, "seconds without the end of a step after which the model counts as hung", minimum=1.0
    )
    compile: bool = option(False, "decode by compiled graphs; compiling takes minutes, before the first request")

    def __post_init__(self):
        fail(self._problems())

    def _problems(self) -> Iterator[str]:
        for each in dataclasses.fields(self):
            yield from below_minimum(each.name, getattr(self, each.name), each.metadata["minimum"])
        if self.port > 65535:
            yield problem("--port", self.port, "must be at most 65535", "Try 5000")
        for origin in self.allow_origins:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
                rule = "must be an origin as browsers send it: scheme://host or scheme://host:port, in small letters"
                yield problem("--allow-origins", origin, rule, "Try https://example.com, or * for all")
        if self.token_file is not None:
            try:
                read_token(self.token_file)  # refused now, and not after minutes of loading a model
            except ConfigError as error:
                yield str(error)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
