"""What /metrics shows, in the text format of Prometheus."""

from __future__ import annotations

from megalith.common.extras import require


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(self):
        self.prometheus = require("prometheus_client", "megalith serve")
        self.registry = self.prometheus.CollectorRegistry()

    def token(self, seconds: float, first: bool) -> None:
        """A token has come, so long after its request (first) or after the token before it."""

    def finished(self, seconds: float) -> None:
        """A text is complete, so long after its request."""

    def cancelled(self, texts: int) -> None:
        """So many texts were given up: their client left, or they took too long."""

    def seconds_per_text(self) -> int:
        """After how many whole seconds, at least 1, a place in the queue should be free."""
        return 1
