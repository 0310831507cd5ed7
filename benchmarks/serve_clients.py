"""Clients of a text server, all at one time, in a process of their own that does little else: benchmarks/serve.py's.

    python benchmarks/serve_clients.py http://127.0.0.1:5000/v1/completions < bodies.json

Standard input is a list of bodies. Each is posted on a connection of its own, all at once. Standard output is a JSON
object: seconds, from the first connection to the last answer's end; answers: of each request a list of [seconds after
it was sent, JSON text], of each event of a stream, or of the one answer that is not streamed.

What comes is stored as it is and read afterwards, so that the clients take as little as possible of the cores that the
server needs.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import re
import sys
import time
import urllib.parse
from typing import Any

EVENT = re.compile(rb"^data: (.*?)\r?$", re.MULTILINE)
LIMIT = 600.0  # seconds for all answers


def main() -> None:
    """Ask, and print what came."""
    bodies = [json.dumps(body).encode() for body in json.load(sys.stdin)]
    seconds, answers = asyncio.run(ask_all(sys.argv[1], bodies))
    json.dump({"seconds": seconds, "answers": [read(parts) for parts in answers]}, sys.stdout)


async def ask_all(url: str, bodies: list[bytes]) -> tuple[float, list[list[tuple[float, bytes]]]]:
    """The seconds that all took together, and what came in answer to each."""
    started = time.perf_counter()
    async with asyncio.timeout(LIMIT):
        answers = await asyncio.gather(*(ask(url, body) for body in bodies))
    return time.perf_counter() - started, answers


async def ask(url: str, body: bytes) -> list[tuple[float, bytes]]:
    """The pieces in which an answer came, and when, in seconds after the request."""
    parts = urllib.parse.urlsplit(url)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    pieces = []
    while piece := await reader.read(1 << 16):
        pieces.append((time.perf_counter() - started, piece))
    writer.close()
    return pieces


def read(pieces: list[tuple[float, bytes]]) -> list[tuple[float, Any]]:
    """The JSON texts of an answer, and when each was complete. Raises SystemExit where the server refused."""
    raw = b"".join(piece for _, piece in pieces)
    head, _, body = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise SystemExit(raw.decode(errors="replace"))
    if b"text/event-stream" not in head.lower():
        return [(pieces[-1][0], json.loads(body))]
    ends = list(itertools.accumulate(len(piece) for _, piece in pieces))
    events = [(pieces[bisect.bisect_left(ends, match.end())][0], match[1]) for match in EVENT.finditer(raw)]
    if not events or events[-1][1] != b"[DONE]":
        raise SystemExit(f"a stream ended early: {raw[-500:].decode(errors='replace')}")
    return [(when, json.loads(text)) for when, text in events[:-1]]


if __name__ == "__main__":
    main()
