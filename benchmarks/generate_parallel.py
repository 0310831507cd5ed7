"""What tensor-parallel decoding reaches of the machine: two processes of one thread each, on one model.

    python benchmarks/generate_parallel.py       writes benchmarks/results/generate_parallel.txt (a quiet machine)

The limit is that of benchmarks/parallel.py: "two alone" are two processes that decode side by side and never
communicate, each with the whole model and a batch of B; their tokens a second are added. "tensor" decodes a batch of 2B
over both processes: the same tokens, and as many threads. Its share of the limit can exceed 1, because two alone read
all weights twice for 2B tokens, and tp2 once. "one process" decodes 2B with two threads; that is what tp2 replaces on
one machine.

tokens/s counts new tokens and includes the reading of the prompts. Greedy; each rank takes the argmax of all logits.
Layouts take turns; medians are compared. The collectives are those of a decoding step, as torch.profiler sees them on
the first rank; their time contains the wait for the other rank.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.parallel import run_workers

RESULT = pathlib.Path(__file__).parent / "results" / "generate_parallel.txt"
LAYOUTS = {  # name -> processes, threads of each, batch of each in units of B, tensor-parallel ranks
    "one process": (1, 2, 2, 1),
    "two alone": (2, 1, 1, 1),
    "tensor": (2, 1, 2, 2),
}
ASKED = 0.80  # share of the limit
STEPS = 16  # decoding steps that are profiled


def work(args: argparse.Namespace) -> None:
    """Be one process of a layout: decode when told to, and tell the seconds of each run, and the tokens."""
    import torch

    _, threads, factor, ranks = LAYOUTS[args.worker]
    torch.set_num_threads(threads)
    from megalith.config.run import RunConfig
    from megalith.generation.cached_attention import PrefillChunk
    from megalith.generation.model import TextModel
    from megalith.generation.parallel.runner import runner_of
    from megalith.runtime.build import build_runtime, init_mesh

    rows, length = factor * args.batch, args.prompt + args.new
    config = RunConfig().replace(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.heads,
        vocab_size=args.vocab_size,
        seq_length=length,
        max_position_embeddings=length,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        openai_gelu=True,
        init_method_std=0.1,
        micro_batch_size=1,
        global_batch_size=1,
        tensor_model_parallel_size=ranks,
        device="cpu",
    )
    runtime = build_runtime(config, init_mesh(config.parallel))
    runtime.train(False)
    runner = runner_of(TextModel.of(runtime), rows, length)
    prompts = [[(7 * i + 13 * row) % args.vocab_size for i in range(args.prompt)] for row in range(rows)]

    def text() -> Iterator[list[int]]:
        """The next token of each row, again and again."""
        logits = runner.prefill([PrefillChunk(row, ids) for row, ids in enumerate(prompts)])
        for position in itertools.count(args.prompt):
            tokens = logits.argmax(dim=-1).tolist()
            yield tokens
            logits = runner.decode(range(rows), tokens, [position] * rows)

    def run() -> list[list[int]]:
        return list(itertools.islice(text(), args.new))

    tokens, _ = run(), run()
    print("READY", flush=True)
    sys.stdin.readline()
    seconds = [timed(run) for _ in range(args.runs)]
    told = {"seconds": seconds, "tokens": tokens, "collectives": collectives(text) if ranks > 1 else None}
    print("RESULT " + json.dumps(told), flush=True)


def collectives(text: Callable[[], Iterator]) -> dict[str, float]:
    """Of a decoding step: its seconds without the profiler, the number of its collectives, and their seconds."""
    from torch.profiler import ProfilerActivity, profile

    started, profiled = text(), text()
    next(started)  # the prompts
    step = statistics.median(timed(lambda: next(started)) for _ in range(STEPS))
    next(profiled)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(STEPS):
            next(profiled)
    found = [event for event in prof.key_averages() if event.key.startswith("_c10d_functional::")]
    number = sum(event.count for event in found if "wait" not in event.key)
    return {
        "step": step,
        "number": number / STEPS,
        "seconds": sum(event.self_cpu_time_total for event in found) / STEPS / 1e6,
    }


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def report(args: argparse.Namespace, results: dict[tuple[int, str], list[list[dict]]]) -> str:
    """The table. results: what each process told in each round, by (B, layout)."""
    import torch

    lines = [
        f"command: python benchmarks/{shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"machine: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}",
        f"{args.num_layers} layers, hidden {args.hidden_size}, vocabulary {args.vocab_size}, float32; {args.new} new "
        f"tokens after {args.prompt}; medians of {args.rounds} x {args.runs} runs",
        "",
        f"{'':26}{'tokens/s':>9}  {'quartiles':>15}  share of the limit  asked  same tokens",
    ]
    for batch in args.batches:
        rates = {  # of each run: the tokens of all processes, over the mean of the seconds that they took
            name: [
                2 * batch * args.new / statistics.mean(seconds)
                for told in results[batch, name]
                for seconds in zip(*(each["seconds"] for each in told))
            ]
            for name in LAYOUTS
        }
        limit = statistics.median(rates["two alone"])
        expected = results[batch, "two alone"][0][0]["tokens"]
        for name, values in rates.items():
            low, middle, high = statistics.quantiles(values, n=4)
            told = results[batch, name][0][0]
            same = [step[:batch] for step in told["tokens"]] == expected
            lines.append(
                f"{f'{name}, {2 * batch} rows in all':26}{middle:9.1f}  {low:6.1f} to {high:5.1f}  "
                f"{middle / limit:18.3f}  {f'{ASKED:.2f}' if name == 'tensor' else '':>5}  {'yes' if same else 'no'}"
            )
        found = [told[0]["collectives"] for told in results[batch, "tensor"]]
        step, number, seconds = (
            statistics.median(each[key] for each in found) for key in ("step", "number", "seconds")
        )
        lines.append(
            f"  tensor: a step takes {step * 1e3:.2f} ms, of which {number:.0f} collectives {seconds * 1e3:.2f} ms "
            f"({seconds / step:.2f} of it, {seconds / number * 1e6:.0f} us each)"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take turns, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    sizes = {"num-layers": 6, "hidden-size": 384, "heads": 6, "vocab-size": 50304, "prompt": 64, "new": 64}
    for name, default in (sizes | {"rounds": 3, "runs": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="B: rows of each process alone")
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    results: dict[tuple[int, str], list[list[dict]]] = {}
    for number in range(args.rounds):
        for batch, (name, (processes, threads, _, ranks)) in itertools.product(args.batches, LAYOUTS.items()):
            script = [__file__, *sys.argv[1:], "--worker", name, "--batch", str(batch)]
            told = run_workers(script, processes, ranks > 1, threads)
            results.setdefault((batch, name), []).append(told)
            print(f"round {number + 1}, {name}, B = {batch}: {told[0]['seconds']}", flush=True)
    text = report(args, results)
    print(text)
    if args.rounds * args.runs >= 9:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
