"""The text server under concurrent clients, against its engine without HTTP and a server around transformers.

    python benchmarks/serve.py          writes benchmarks/results/serve.txt (a quiet machine; a quarter of an hour)
    python benchmarks/serve.py --quick  seconds, and nothing is written

One model in a Hugging Face folder, with random weights, and the same requests for all, greedy and past the end of
documents; each round has other prompts, because equal ones would be read once. "engine": all requests are queued at
once in an Engine in this process, tokens in and tokens out. "megalith serve": the command, in a process of its own;
clients in another (benchmarks/serve_clients.py) post all requests at once to /v1/completions, for whole answers.
"streamed": the same for an event of each token, from a server that has not read the prompts yet. "transformers":
benchmarks/serve_transformers.py, with the faster of that library's two caches; it answers when a batch is complete, and
has no streams. All have the same cores, the clients too. They take turns; each has a round that is not timed.

tokens/s: new tokens over the time from the first connection to the end of the last answer; medians of the rounds. Times
to the first token count from a request's connection, times between tokens from one event of a stream to the next; both
are over all requests of all rounds; of an answer that is not streamed, the first token comes with the last. The lengths
are those of continuous_batching.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import tokenizers
import torch
import transformers

from benchmarks.continuous_batching import LENGTHS, percentile
from benchmarks.generate import CACHES, arguments, build_models, header
from megalith.generation.engine import Engine, Request
from megalith.generation.load import load
from megalith.generation.params import SamplingParams

FOLDER = pathlib.Path(__file__).parent
RESULT = FOLDER / "results" / "serve.txt"
ENGINE, SERVER, STREAMED, PEER = "engine", "megalith serve", "streamed", "transformers"
ASKED = {ENGINE: 0.90, PEER: 2.0}  # the server's tokens a second over those of the other, at least


class Ask(NamedTuple):
    """A request: the tokens of its prompt, and how many new ones."""

    ids: list[int]
    new: int


class Answer(NamedTuple):
    """A text, and when each part of it came, in seconds after the request."""

    text: str
    times: list[float]


class Round(NamedTuple):
    """The seconds of all requests of a round together, and their answers."""

    seconds: float
    answers: list[Answer]


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[32, 256], help="requests, all at one time")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--rows", type=int, default=32, help="texts that are written at one time")
    parser.add_argument("--quick", action="store_true", help="a small model and few requests; nothing is written")
    args = arguments(parser)
    if args.quick:
        args.num_layers, args.hidden_size, args.heads, args.vocab_size, args.rounds = 2, 64, 2, 512, 1
        args.clients = [4]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_model(args, folder)
        model = load(folder)
        engine = Engine(model, max_batch_size=args.rows)
        serve = ["-m", "megalith", "serve", folder, "--port", "0", "--max-batch-size", str(args.rows)]
        peer = [str(FOLDER / "serve_transformers.py"), folder, "--rows", str(args.rows), "--cache"]
        commands = {SERVER: serve, STREAMED: serve} | {cache: [*peer, cache] for cache in CACHES}
        urls = {name: stack.enter_context(server(each, args.threads)) for name, each in commands.items()}
        seeds = itertools.count(1)  # other prompts each time
        taken = {
            cache: through_peer(urls[cache], draw(args, "uniform", args.clients[0], next(seeds))).seconds
            for cache in CACHES
            for _ in range(2)  # the first is not timed
        }
        cache = min(taken, key=taken.__getitem__)
        shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items())
        lines = [*header(args), f"{args.rows} texts at one time; transformers' caches on the first table's: {shown}"]
        candidates = {
            ENGINE: lambda asks: alone(engine, asks),
            SERVER: lambda asks: through_server(urls[SERVER], asks, stream=False),
            STREAMED: lambda asks: through_server(urls[STREAMED], asks, stream=True),
            PEER: lambda asks: through_peer(urls[cache], asks),
        }
        for run in candidates.values():
            run(draw(args, "uniform", 4, next(seeds)))
        for lengths, clients in itertools.product(args.lengths, args.clients):
            rounds: dict[str, list[Round]] = {name: [] for name in candidates}
            asked = []
            for number in range(args.rounds):
                asks = draw(args, lengths, clients, next(seeds))
                asked.append(sum(ask.new for ask in asks))
                for name, run in candidates.items():
                    rounds[name].append(run(asks))
                    seconds = rounds[name][-1].seconds
                    print(f"{lengths}, {clients}, round {number + 1}, {name}: {seconds:.2f} s", file=sys.stderr)
            lines += ["", *table(lengths, clients, asked, rounds)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if not args.quick:
        pathlib.Path(args.out or RESULT).write_text(text)


def draw(args: argparse.Namespace, lengths: str, count: int, seed: int) -> list[Ask]:
    """Requests with prompts of random tokens."""
    drawn, asks = random.Random(seed), list[Ask]()
    for _ in range(count):
        prompt, new = LENGTHS[lengths](drawn)
        asks.append(Ask([drawn.randrange(1, args.vocab_size) for _ in range(prompt)], new))
    return asks


def write_model(args: argparse.Namespace, folder: str) -> None:
    """A Hugging Face folder, with a tokenizer of words of which each begins with a space.

    So equal texts are equal tokens, and no text waits for the end of a character.
    """
    _, original = build_models(args)
    original.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = itertools.islice(itertools.product(letters, repeat=4), args.vocab_size - 1)
    vocabulary = {"<|endoftext|>": 0} | {"Ġ" + "".join(word): number for number, word in enumerate(words, 1)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>").save_pretrained(folder)


@contextlib.contextmanager
def server(command: Sequence[str], threads: int) -> Iterator[str]:
    """A server in a process of its own: the URL that it prints. It is ended by SIGTERM."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=log, text=True, cwd=FOLDER.parent,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        try:
            line = process.stdout.readline().strip()
            if not line.startswith("http://"):
                log.seek(0)
                raise SystemExit(f"{' '.join(command)} did not start: {line}\n{log.read()}")
            yield line
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def alone(engine: Engine, asks: Sequence[Ask]) -> Round:
    """All requests queued at once in an engine."""
    started = time.perf_counter()
    tokens: dict[int, list[int]] = {}
    times: dict[int, list[float]] = {}
    for ask in asks:
        params = SamplingParams(temperature=0.0, max_new_tokens=ask.new)
        id = engine.add(Request(prompt_ids=ask.ids, params=params))
        tokens[id], times[id] = [], []
    while engine.busy:
        for event in engine.step():
            tokens[event.id].append(event.token)
            times[event.id].append(time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return Round(seconds, [Answer(engine.text_model.tokenizer.decode(tokens[id]), times[id]) for id in tokens])


def through_server(url: str, asks: Sequence[Ask], stream: bool) -> Round:
    """All requests posted at once to /v1/completions."""
    fixed = {"temperature": 0, "stream": stream, "ignore_eos": True}
    told = post(f"{url}/v1/completions", [{"prompt": ask.ids, "max_tokens": ask.new, **fixed} for ask in asks])
    answers = [
        Answer("".join(event["choices"][0]["text"] for _, event in events), [when for when, _ in events])
        for events in told["answers"]
    ]
    return Round(told["seconds"], answers)


def through_peer(url: str, asks: Sequence[Ask]) -> Round:
    """All requests posted at once to transformers' server."""
    told = post(f"{url}/generate", [{"ids": ask.ids, "new": ask.new} for ask in asks])
    return Round(told["seconds"], [Answer(event["text"], [when]) for ((when, event),) in told["answers"]])


def post(url: str, bodies: Sequence[dict]) -> dict:
    """What the clients report."""
    command = [sys.executable, str(FOLDER / "serve_clients.py"), url]
    done = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{url}: {done.stderr}")
    return json.loads(done.stdout)


def table(lengths: str, clients: int, asked: Sequence[int], rounds: dict[str, list[Round]]) -> list[str]:
    """The lines on one set of requests. asked: the new tokens of each round."""
    rate = {
        name: statistics.median(tokens / each.seconds for tokens, each in zip(asked, runs))
        for name, runs in rounds.items()
    }
    lines = [
        f"{clients} requests at once, {lengths} lengths; {statistics.mean(asked):.0f} new tokens a round, "
        f"{len(asked)} rounds",
        f"{'':20}{'tokens/s':>9}{'ratio':>8}{'first token, ms':>20}{'between tokens, ms':>20}   same texts",
        f"{'':20}{'':>17}" + f"{'p50':>10}{'p95':>10}" * 2,
    ]
    expected = [answer.text for each in rounds[ENGINE] for answer in each.answers]
    for name, runs in rounds.items():
        answers = [answer for each in runs for answer in each.answers]
        first = [answer.times[0] for answer in answers]
        between = [after - before for answer in answers for before, after in itertools.pairwise(answer.times)]
        shown = "".join(
            f"{1e3 * percentile(values, share):10.1f}" if values else f"{'-':>10}"
            for values in (first, between)
            for share in (0.5, 0.95)
        )
        same = sum(answer.text == text for answer, text in zip(answers, expected))
        lines.append(f"{name:20}{rate[name]:9.1f}{rate[SERVER] / rate[name]:8.2f}{shown}   {same} of {len(answers)}")
    told = (f"{rate[SERVER] / rate[name]:.2f} of {name} (at least {least:.2f})" for name, least in ASKED.items())
    return [*lines, f"megalith serve: {', '.join(told)}"]


if __name__ == "__main__":
    main()
