"""Evaluation speed and memory against transformers: the same weights and tokens, each candidate in its own process.

    python benchmarks/evaluate.py --out benchmarks/results/evaluate.txt      CPU: 6 layers, hidden 384, vocabulary 50304
    python benchmarks/evaluate.py --device cuda --dtype bfloat16 --num-layers 24 --hidden-size 1024 --heads 16

WikiText: overlapping windows of a text of --tokens tokens, of which the last --stride count; transformers reads the
same windows in the same batches. LAMBADA: --passages passages of 40 to 120 tokens, of which the last is predicted;
transformers reads them one by one, as scripts do, and in batches of passages in their order, padded at the right.
Tokens are random; what they cost is not. Memory is the peak beyond the loaded model (of a GPU's allocations, or of the
process). "same": the mean losses agree to 1e-4, and as many answers are right. Candidates take turns; medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import torch

from megalith.evaluation.scoring import Sample, Scorer
from megalith.evaluation.windows import windows
from megalith.generation.load import load
from megalith.parallel.devices import synchronize

CANDIDATES = {"wikitext": ("megalith", "transformers"), "lambada": ("megalith", "transformers", "transformers batched")}
PASSAGE = 40, 120  # tokens


def main() -> None:
    """Measure every candidate and print the tables."""
    args = arguments()
    if args.candidate:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        make_model(args)
        results: dict[tuple[str, str], list[dict]] = {}
        for _ in range(args.rounds):
            for task, names in CANDIDATES.items():
                for name in names:
                    results.setdefault((task, name), []).append(in_its_own_process(args, task, name))
    text = "\n".join([*header(args), *table(args, results)]) + "\n"
    print(text, end="")
    if args.out:
        pathlib.Path(args.out).write_text(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    sizes = {"num-layers": 6, "hidden-size": 384, "heads": 6, "vocab-size": 50304, "seq-length": 1024, "stride": 32}
    sizes |= {"tokens": 1600, "passages": 64, "batch": 8, "rounds": 3, "threads": 2}
    for name, value in sizes.items():
        add(f"--{name}", type=int, default=value)
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--out")
    for name in ("folder", "task", "candidate"):  # of the processes that it starts
        add(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> None:
    """A GPT-2 of transformers with random weights, in args.folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=args.vocab_size, n_positions=args.seq_length, n_embd=args.hidden_size, n_layer=args.num_layers,
        n_head=args.heads, bos_token_id=0, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(args.folder)


def in_its_own_process(args: argparse.Namespace, task: str, candidate: str) -> dict:
    """What `measure` gives of one candidate."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if value is not None]
    command = [sys.executable, __file__, *words, "--task", task, "--candidate", candidate]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Seconds, peak bytes beyond the loaded model, and the results' sums, of one candidate."""
    torch.set_num_threads(args.threads)
    samples = wikitext_samples(args) if args.task == "wikitext" else lambada_samples(args)
    if args.candidate == "megalith":
        scorer = Scorer(load(args.folder, device=args.device, dtype=args.dtype), args.batch)
        device, run = torch.device(args.device), lambda chosen: scorer(chosen).sum(axis=0).tolist()
    else:
        from transformers import AutoModelForCausalLM

        model = (
            AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype)).to(args.device).eval()
        )
        device, batch = torch.device(args.device), args.batch
        if args.task == "lambada" and args.candidate == "transformers":
            batch = 1
        run = lambda chosen: theirs(model, chosen, batch)  # noqa: E731
    before = memory(device, reset=True)
    run(samples[: args.batch])  # what only the first call does
    synchronize(device)
    started = time.perf_counter()
    loss, hits = run(samples)
    synchronize(device)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": memory(device) - before, "loss": loss / len(samples), "hits": hits}


def memory(device: torch.device, reset: bool = False) -> int:
    """The peak so far, in bytes; after `reset` from now on, and what is held now."""
    if device.type != "cpu":
        if reset:
            torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.max_memory_allocated()
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def wikitext_samples(args: argparse.Namespace) -> list[Sample]:
    tokens = np.random.RandomState(1).randint(0, args.vocab_size, args.tokens)
    return list(windows(tokens, args.seq_length, args.stride))


def lambada_samples(args: argparse.Namespace) -> list[Sample]:
    draw = random.Random(1)
    lengths = [draw.randint(*PASSAGE) for _ in range(args.passages)]
    return [Sample([draw.randrange(args.vocab_size) for _ in range(length)], 1) for length in lengths]


@torch.no_grad()
def theirs(model, samples: Sequence[Sample], batch: int) -> list[float]:
    """Summed loss and right tokens, by transformers' model and its logits."""
    loss, hits = 0.0, 0
    for first in range(0, len(samples), batch):
        chosen = samples[first : first + batch]
        longest = max(len(sample.ids) for sample in chosen)
        rows = [[*sample.ids, *[0] * (longest - len(sample.ids))] for sample in chosen]
        ids = torch.tensor(rows, device=model.device)
        logits = model(ids[:, :-1]).logits
        for row, (tokens, scored) in enumerate(chosen):
            end = len(tokens) - 1
            labels, found = ids[row, end + 1 - scored : end + 1], logits[row, end - scored : end].float()
            loss += float(torch.nn.functional.cross_entropy(found, labels, reduction="sum"))
            hits += int((found.argmax(dim=-1) == labels).sum())
    return [loss, hits]


def header(args: argparse.Namespace) -> list[str]:
    import transformers

    return [
        f"{datetime.date.today()}, {platform.machine()}, {args.device}, {args.threads} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        f"{args.num_layers} layers, hidden {args.hidden_size}, vocabulary {args.vocab_size}, {args.dtype}; "
        f"{args.tokens} tokens in windows of {args.seq_length}, {args.stride} apart; {args.passages} passages; "
        f"batches of {args.batch}; medians of {args.rounds} rounds",
        "",
    ]


def table(args: argparse.Namespace, results: dict[tuple[str, str], list[dict]]) -> list[str]:
    """A line for each candidate, with ratios to ours."""
    middle = {
        key: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for key, rounds in results.items()
    }
    lines = [f"{'':32}{'seconds':>10}{'MiB':>9}{'time / ours':>13}{'memory / ours':>15}   same"]
    for (task, name), found in middle.items():
        ours = middle[task, "megalith"]
        same = abs(found["loss"] / ours["loss"] - 1) < 1e-4 and found["hits"] == ours["hits"]
        lines.append(
            f"{task + ', ' + name:32}{found['seconds']:10.3f}{found['memory'] / 2**20:9.1f}"
            f"{found['seconds'] / ours['seconds']:13.2f}{found['memory'] / max(1, ours['memory']):15.2f}   "
            f"{'yes' if same else 'no'}"
        )
    return lines


if __name__ == "__main__":
    main()
