"""The text server that one writes around transformers' `generate`: what is queued is generated together.

    python benchmarks/serve_transformers.py FOLDER --cache static --rows 32

The peer of benchmarks/serve.py. POST /generate with {"ids": prompt's tokens, "new": number} answers {"text": ...}. One
thread runs the model. It takes the first request that waits and all that come until WAIT seconds later, at most --rows,
in the order in which they came (a server does not know how long texts will be), pads them on the left, generates until
the longest is complete, and answers all. The URL is printed when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import pathlib
import queue
import socket
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import fastapi
import torch
import transformers
import uvicorn

from benchmarks.generate import CACHES, theirs
from megalith.generation.engine import Request
from megalith.generation.params import SamplingParams

WAIT = 0.1  # seconds: little beside a batch's, and long enough that requests sent together are one batch


class Batcher:
    """A queue of requests, and the thread that generates their texts in batches."""

    def __init__(self, folder: str, cache: str, rows: int):
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.cache, self.rows = cache, rows
        self.queue = queue.Queue[tuple[Request, concurrent.futures.Future]]()
        threading.Thread(target=self.run, daemon=True).start()

    def submit(self, ids: list[int], new: int) -> concurrent.futures.Future[str]:
        """Queue a prompt; the future is its text."""
        future = concurrent.futures.Future[str]()
        self.queue.put((Request(prompt_ids=ids, params=SamplingParams(max_new_tokens=new)), future))
        return future

    def run(self) -> None:
        """Batch after batch. The model is loaded here: see serving/engine_thread.py, without_thread_pool."""
        model = transformers.GPT2LMHeadModel.from_pretrained(self.folder).eval()
        while True:
            batch = [self.queue.get()]
            end = time.monotonic() + WAIT
            while len(batch) < self.rows:
                try:
                    batch.append(self.queue.get(timeout=max(0.0, end - time.monotonic())))
                except queue.Empty:
                    break
            texts = theirs(model, [request for request, _ in batch], self.cache, do_sample=False)
            for (_, future), tokens in zip(batch, texts):
                future.set_result(self.tokenizer.decode(tokens))


def main() -> None:
    """Serve until ended by a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--cache", choices=CACHES, default="static")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batcher, app = Batcher(args.folder, args.cache, args.rows), fastapi.FastAPI()

    @app.post("/generate")
    async def generate(body: dict) -> dict[str, str]:
        return {"text": await asyncio.wrap_future(batcher.submit(body["ids"], body["new"]))}

    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


if __name__ == "__main__":
    main()
