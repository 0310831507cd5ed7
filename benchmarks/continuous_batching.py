"""Many requests of mixed lengths: continuous batching, one after the other, and transformers' static batches.

    python benchmarks/continuous_batching.py --out benchmarks/results/continuous_batching.txt

"engine": all requests are queued at once. "one after the other": an engine with one row. "static": transformers'
`generate` on batches, each padded on the left and decoded to its longest text; every grouping is tried with both of
its caches, and the fastest three take turns with the others. Only tokens that were asked for are counted. The model is
that of benchmarks/generate.py. Times to the first token count from a request's arrival, times between tokens from its
token before; both are over all requests together. Poisson arrivals come at 0.7 of the requests a second that the engine
completes when all are queued. "half sampled": every second request has its own temperature, top-k and top-p.

Lengths, in tokens: "uniform", prompts of 16 to 256 and 16 to 128 new ones, each length as likely as another;
"exponential", of 16 to 256 and 16 to 384, most of them short, as in a chat.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import random
import sys
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
from transformers import GPT2LMHeadModel

from benchmarks.generate import CACHES, arguments, build_models, header, ours, size, take_turns, theirs
from megalith.generation.engine import Engine, Request
from megalith.generation.params import SamplingParams

POISSON, SEED = 0.7, 1


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--lengths", choices=LENGTHS, default="uniform")
    args = arguments(parser)
    torch.set_num_threads(args.threads)
    model, original = build_models(args)
    greedy, mixed = build_requests(args, sampled=False), build_requests(args, sampled=True)
    longest = max(sum_of_sizes(request) for request in greedy)
    engine = Engine(model, max_batch_size=len(greedy), max_length=longest, prefix_caching=False)
    alone = Engine(model, max_batch_size=1, max_length=longest, prefix_caching=False)
    candidates = {
        "engine": lambda: ours(engine, greedy),
        "engine, half sampled": lambda: ours(engine, mixed),
        "one after the other": lambda: ours(alone, greedy),
    }
    fastest, every = groupings(original, greedy)
    candidates |= {
        name: lambda b=batches, c=cache: static(original, b, c) for name, (batches, cache) in fastest.items()
    }
    seconds, tokens = take_turns(candidates, args.rounds, original.device)
    new = sum(request.params.max_new_tokens for request in greedy)
    same = sum(a == b for a, b in zip(tokens["engine"], tokens[next(iter(fastest))]))
    best = min(seconds[name] for name in fastest)
    lines = [
        *header(args),
        f"{len(greedy)} requests, {args.lengths} lengths, {new} new tokens in all; medians of {args.rounds} rounds",
        f"the engine's tokens are those of transformers for {same} of the {len(greedy)} requests",
        "",
        f"{'':44}{'seconds':>8}{'tokens/s':>10}{'engine is faster by':>21}",
        *(f"{name:44}{t:8.2f}{new / t:10.1f}{t / seconds['engine']:21.2f}" for name, t in seconds.items()),
        f"best static batching: {best / seconds['engine']:.2f}; one after the other: "
        f"{seconds['one after the other'] / seconds['engine']:.2f}; half sampled: "
        f"{seconds['engine'] / seconds['engine, half sampled']:.3f} of all greedy",
        "static batchings once: " + ", ".join(f"{name[8:]} {taken:.2f} s" for name, taken in every.items()),
        "",
        *latencies(args, engine, greedy, mixed, seconds["engine"]),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out:
        pathlib.Path(args.out).write_text(text)


def uniform(draw: random.Random) -> tuple[int, int]:
    """(tokens of a prompt, new tokens), each length as likely as another."""
    return draw.randint(16, 256), draw.randint(16, 128)


def exponential(draw: random.Random) -> tuple[int, int]:
    """(tokens of a prompt, new tokens), most of them short."""
    return min(256, 16 + int(draw.expovariate(1 / 64))), min(384, 16 + int(draw.expovariate(1 / 56)))


LENGTHS = {"uniform": uniform, "exponential": exponential}


def build_requests(args: argparse.Namespace, sampled: bool) -> list[Request]:
    """Requests of the same lengths and prompts each time; sampled: every second one is sampled in its own way."""
    draw, requests = random.Random(SEED), list[Request]()
    for index in range(args.requests):
        length, new = LENGTHS[args.lengths](draw)
        ids = [draw.randrange(args.vocab_size) for _ in range(length)]
        params = SamplingParams(temperature=0.0, max_new_tokens=new)
        if sampled and index % 2:
            temperature, k, p = 0.7 + index / 100, (0, 20, 50)[index % 3], (0.0, 0.8, 0.9, 0.95)[index // 2 % 4]
            params = SamplingParams(temperature=temperature, top_k=k, top_p=p, max_new_tokens=new, seed=SEED)
        requests.append(Request(prompt_ids=ids, params=params, index=index))
    return requests


def groupings(original: GPT2LMHeadModel, requests: Sequence[Request]) -> tuple[dict, dict[str, float]]:
    """The three fastest static batchings (name -> batches of requests, cache), and the seconds of all, in order."""
    orders = {
        "as they come": list(requests),
        "by new tokens": sorted(requests, key=lambda request: request.params.max_new_tokens),
        "by prompt": sorted(requests, key=lambda request: len(request.prompt_ids)),
        "by both": sorted(requests, key=sum_of_sizes),
    }
    batchings = {}
    for order, ordered in orders.items():
        for count in (4, 8, 16, len(requests)):
            if count < len(requests) or (count == len(requests) and order == "as they come"):
                batches = [ordered[first : first + count] for first in range(0, len(ordered), count)]
                batchings |= {f"static, {order}, {count} rows, {cache}": (batches, cache) for cache in CACHES}
    seconds = {}
    static(original, *next(iter(batchings.values())))  # warm
    for name, batching in batchings.items():
        started = time.perf_counter()
        static(original, *batching)
        seconds[name] = time.perf_counter() - started
    ranked = sorted(seconds, key=seconds.get)
    return {name: batchings[name] for name in ranked[:3]}, {name: seconds[name] for name in ranked}


def sum_of_sizes(request: Request) -> int:
    """Tokens of the prompt and new ones."""
    return sum(size(request))


def static(original: GPT2LMHeadModel, batches: Sequence[Sequence[Request]], cache: str) -> list[list[int]]:
    """New tokens of each request, in the order of their indices."""
    made = {}
    for batch in batches:
        texts = theirs(original, batch, cache, do_sample=False)
        made |= {request.index: tokens for request, tokens in zip(batch, texts)}
    return [made[index] for index in sorted(made)]


def latencies(
    args: argparse.Namespace, engine: Engine, greedy: Sequence[Request], mixed: Sequence[Request], seconds: float
) -> list[str]:  # fmt: skip
    """The table of times to the first token and between tokens. seconds: of all requests when queued at once."""
    lines = [f"{'milliseconds':44}{'first token':>18}{'between tokens':>18}", f"{'':44}" + f"{'p50':>9}{'p95':>9}" * 2]
    rate = POISSON * len(greedy) / seconds
    for name, requests, poisson in (
        ("all queued at once", greedy, False),
        ("all queued at once, half sampled", mixed, False),
        (f"Poisson, {rate:.2f} requests/s", greedy, True),
        (f"Poisson, {rate:.2f} requests/s, half sampled", mixed, True),
    ):
        first, between, draw = list[float](), list[float](), random.Random(SEED)
        for _ in range(args.rounds):
            arrivals = [draw.expovariate(rate) if poisson else 0.0 for _ in requests]
            for times in serve(engine, requests, arrivals):
                first.append(times[0])
                between += (after - before for before, after in itertools.pairwise(times))
        shown = [1e3 * percentile(values, share) for values in (first, between) for share in (0.5, 0.95)]
        lines.append(f"{name:44}" + "".join(f"{value:9.1f}" for value in shown))
    return lines


def serve(engine: Engine, requests: Sequence[Request], gaps: Sequence[float]) -> list[list[float]]:
    """The seconds after its arrival of each token of each request. gaps: seconds between arrivals."""
    arrivals, total = [], 0.0
    for gap in gaps:
        total += gap
        arrivals.append(total)
    arrived: dict[int, float] = {}  # request -> when it came
    times: dict[int, list[float]] = {}
    started = time.perf_counter()
    while len(arrived) < len(requests) or engine.busy:
        now = time.perf_counter() - started
        while len(arrived) < len(requests) and arrivals[len(arrived)] <= now:
            when, request = arrivals[len(arrived)], requests[len(arrived)]
            id = engine.add(request)
            arrived[id], times[id] = when, []
        if not engine.busy:
            time.sleep(arrivals[len(arrived)] - now)
            continue
        for event in engine.step():
            times[event.id].append(time.perf_counter() - started - arrived[event.id])
    return list(times.values())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is no smaller than this share of all."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
