"""Connections that cost a client nothing must cost the server little: limits on heads of requests and on readers.

uvicorn limits neither how long or large the head of a request is, nor how long a client may leave an answer unread.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0  # until the head of a request is there, from its first byte or from the connection's start
HEAD_BYTES = 64 * 1024
UNREAD_SECONDS = 60.0  # in which a client that has stopped reading must take something


class Connection(HttpToolsProtocol):
    """uvicorn's protocol of a connection, with these limits; for `uvicorn.Config(http=...)`."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.head_bytes = 0
        self.head_timer: asyncio.TimerHandle | None = None
        self.unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause at the first byte that the system's own buffer cannot take
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; what is not of a request's body is of a head, also while an earlier request is answered."""
        cycle = self.cycle
        in_body = cycle is not None and cycle.more_body
        super().data_received(data)
        if self.transport.is_closing():
            return
        if in_body or self.cycle is not cycle:  # which a complete head has brought
            self._stop_waiting()
            return
        self.head_bytes += len(data)
        if cycle is not None and not cycle.response_complete:
            if self.head_bytes > HEAD_BYTES:
                self.transport.abort()  # nothing can be said within the other answer
            return
        if self.head_bytes > HEAD_BYTES:
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
            self.transport.close()
        self._wait_for_head()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to; `send` of the application waits from now on."""
        super().pause_writing()
        self.unread_timer = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read all that waited; `send` goes on."""
        super().resume_writing()
        self._stop_unread_timer()

    def connection_lost(self, error: Exception | None) -> None:
        """Forget all about it."""
        self._stop_waiting()
        self._stop_unread_timer()
        super().connection_lost(error)

    def _wait_for_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
        self.head_bytes, self.head_timer = 0, None

    def _stop_unread_timer(self) -> None:
        if self.unread_timer is not None:
            self.unread_timer.cancel()
