"""Two source trees are equally fast: the figures of train.py, parallel.py, index.py and preprocess.py, old beside new.

    git worktree add ../old 756ff61                          # and a .venv in it: make -C ../old install
    python benchmarks/same_speed.py ../old . --gpt2 FOLDER --output benchmarks/results/same_speed.txt    # 40 minutes
    python benchmarks/same_speed.py ../old . --only train    # figures whose name has this in it

Each tree runs the workers of its own scripts with its own Python, in turn, several rounds; which tree goes first
changes from round to round. A line per figure: both medians, the ratio of the medians in the sense "above 1: NEW is
better", and the quartiles of the ratios within a round, which show the noise. The machine must be quiet.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

Figures = dict[str, float]  # name -> value; what begins as SMALL is better when small
SMALL = ("seconds", "cpu", "peak", "with")  # "with 1000 samples read" are seconds too
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.same_results import described  # noqa: E402

LAYOUTS = ("two alone", "tensor", "data, replicated", "data, sharded optimizer", "pipeline")
WORKERS = (("index, ours", 5), ("samples, ours", 5), ("blend of 200 sources, ours", 1), ("many files", 3))


def run(tree: pathlib.Path, *words: str) -> str:
    """What `python WORDS` of a tree prints, run in that tree; its error ends this program."""
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [str(tree / ".venv/bin/python"), "-W", "ignore", *words]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def train(tree: pathlib.Path, candidate: str) -> Figures:
    """A worker of train.py."""
    found = json.loads(run(tree, "benchmarks/train.py", "--worker", candidate, "--steps", "4").split("RESULT ")[1])
    return {"tokens/s": found["tokens_per_second"], "peak MiB": found["memory"] / 2**20}


def parallel(tree: pathlib.Path) -> Figures:
    """One round of parallel.py: tokens a second of each layout."""
    said = run(tree, "benchmarks/parallel.py", "--rounds", "1", "--steps", "3", "--layouts", *LAYOUTS)
    return {name: float(rate) for name, rate in re.findall(r"^round 1 (.*): (\d+) tokens/s", said, re.MULTILINE)}


def index(tree: pathlib.Path, kind: str, folder: pathlib.Path) -> Figures:
    """A worker of index.py."""
    found = json.loads(run(tree, "benchmarks/index.py", "--measure", kind, str(folder)).splitlines()[-1])
    return {name: value for name, value in found.items() if name not in ("samples", "checksum", "files")}


def preprocess(tree: pathlib.Path, corpus: pathlib.Path, flags: list[str]) -> Figures:
    """The whole command on the corpus of preprocess.py."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = ["-m", "megalith", "data", "preprocess", "--input", str(corpus), "--output-prefix", f"{corpus}.same"]
    run(tree, *words, "--workers", "2", "--overwrite", *flags)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def figures(
    args: argparse.Namespace, scratch: pathlib.Path
) -> dict[str, tuple[int, Callable[[pathlib.Path], Figures]]]:
    """Name -> rounds, and what measures a tree. Corpora are written once, by NEW, for both."""
    made: dict[str, tuple[int, Callable[[pathlib.Path], Figures]]] = {}
    for candidate in ("megalith", "megalith-compile"):
        made[f"train {candidate}"] = (args.rounds, functools.partial(train, candidate=candidate))
    made["parallel"] = (args.rounds, parallel)
    for kind, rounds in WORKERS:
        made[f"index: {kind}"] = (rounds, functools.partial(index, kind=kind, folder=scratch))
    if args.gpt2:
        corpus, files = scratch / "corpus.jsonl", [f"{args.gpt2}/{name}" for name in ("vocab.json", "merges.txt")]
        flags = [
            "--tokenizer-type",
            "GPT2BPETokenizer",
            "--vocab-file",
            files[0],
            "--merge-file",
            files[1],
            "--append-eod",
        ]
        made["preprocess GPT-2"] = (5, functools.partial(preprocess, corpus=corpus, flags=flags))
    return {name: entry for name, entry in made.items() if args.only in name}


def corpora(names: list[str], scratch: pathlib.Path) -> None:
    """What index.py and preprocess.py read, of their full size."""
    if any(name.startswith("index") for name in names):
        from benchmarks.index import write_corpus, write_many

        write_corpus(scratch, 2_000_000)
        write_many(scratch, 2_500)
        (scratch / "full").touch()
    if any(name.startswith("preprocess") for name in names):
        from benchmarks.preprocess import assemble

        assemble(scratch / "corpus.jsonl", 200)


def compare(name: str, rounds: int, measure: Callable, old: pathlib.Path, new: pathlib.Path) -> list[str]:
    """A line for each figure of one measurement."""
    found: dict[pathlib.Path, list[Figures]] = {old: [], new: []}
    for number in range(rounds):
        for tree in (old, new) if number % 2 == 0 else (new, old):
            found[tree].append(measure(tree))
    lines = []
    for figure in found[new][0]:
        if not all(each[figure] for tree in found for each in found[tree]):
            continue  # a peak that does not rise above the start's says nothing
        before, after = ([each[figure] for each in found[tree]] for tree in (old, new))
        small = figure.startswith(SMALL)
        ratios = [a / b if small else b / a for a, b in zip(before, after)]
        middle = [statistics.median(values) for values in (before, after)]
        ratio = middle[0] / middle[1] if small else middle[1] / middle[0]
        low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        what = f"{name}, {figure}"
        lines.append(f"{what:76} {middle[0]:12.6g} {middle[1]:12.6g} {ratio:8.3f}  {low:.3f} to {high:.3f}")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--only", default="", help="figures whose name has this in it")
    parser.add_argument("--rounds", type=int, default=5, help="of train and parallel")
    parser.add_argument("--gpt2", help="folder with vocab.json and merges.txt, for preprocess")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table here")
    args = parser.parse_args()
    old, new = args.old.resolve(), args.new.resolve()
    lines = [
        f"command: python benchmarks/same_speed.py OLD NEW {' '.join(sys.argv[3:])}",
        f"machine: {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}",
        f"old: {described(old)}",
        f"new: {described(new)}",
        f"{'':76} {'old':>12} {'new':>12} {'ratio':>8}  quartiles of the ratio (above 1: new is better)",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        chosen = figures(args, pathlib.Path(folder))
        corpora(list(chosen), pathlib.Path(folder))
        for name, (rounds, measure) in chosen.items():
            lines += compare(name, rounds, measure, old, new)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
