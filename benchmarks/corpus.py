"""`megalith data dedup` and `clean` against their plain peers: time, peak memory, what is found.

    python benchmarks/corpus.py [--documents 1000000] [--recall 2000] > benchmarks/results/corpus.txt

dedup: synthetic documents of some 170 words (a Zipf distribution over 50,000 words), a tenth of them planted copies
with 1 to 10 % of their words replaced; ours is the whole command (two workers by default), from file to file.
datasketch's MinHash of 128 values and its LSH, with the same shingles, run on a part of them, in one process, texts in
memory, nothing written: documents a second of one core. Published on other machines: fastdedup 1,227 documents/s/core,
marin 4,152.

recall: copies of texts with 1 to 30 % of their words replaced, at the default threshold; beside it datasketch's LSH
unverified, and the original's rule (5-grams of characters, verified Jaccard above 0.5, groups from 0.7).

clean: ftfy and language identification, documents a second of one core, beside ftfy.fix_text and langdetect.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
SHARES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3)
MAX_PLANTED = 0.1


def synthetic(path: pathlib.Path, count: int, seed: int = 1) -> dict[int, tuple[int, float]]:
    """Write so many documents; returns {document: (the one that it is a copy of, share of words replaced)}."""
    draw = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i:x}" for i in range(50_000)])
    weights = 1 / np.arange(10, 50_010)
    weights /= weights.sum()
    planted: dict[int, tuple[int, float]] = {}
    with open(path, "wb") as out:
        number = 0
        while number < count:
            lengths = draw.integers(100, 240, 1000)
            words = vocabulary[draw.choice(len(vocabulary), lengths.sum(), p=weights)]
            texts = np.split(words, np.cumsum(lengths)[:-1])
            sources = range(number, number + len(texts))
            rows = list(zip(texts, sources))
            for text, source in list(zip(texts, sources))[::9]:
                share = float(draw.uniform(0.01, MAX_PLANTED))
                copy = text.copy()
                places = draw.choice(len(copy), max(1, round(share * len(copy))), replace=False)
                copy[places] = vocabulary[draw.integers(0, len(vocabulary), len(places))]
                planted[number + len(rows)] = (source, share)
                rows.append((copy, source))
            for text, _ in rows[: count - number]:
                out.write(json.dumps({"text": " ".join(text)}).encode() + b"\n")
            number += len(rows)
    return {copy: found for copy, found in planted.items() if copy < count}


def measured(command: list[str]) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak memory (MB, of the largest process) of a command in a process of its own."""
    script = (
        "import json, resource, subprocess, sys, time; start = time.monotonic(); done = subprocess.run(sys.argv[1:]);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]));"
        "sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    wall, cpu, peak = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": wall, "cpu": cpu, "peak_mb": peak}


def ours(path: pathlib.Path, folder: pathlib.Path, workers: int) -> dict[str, float]:
    """The whole command."""
    words = ["data", "dedup", "--input", str(path), "--output", str(folder / "out.jsonl"), "--workers", str(workers)]
    return measured([sys.executable, "-m", "megalith", *words, "--over-budget", "warn", "--overwrite"])


def removed(folder: pathlib.Path) -> list[dict]:
    """The evidence, with numbers of documents."""
    lines = (folder / "out.jsonl.removed.jsonl").read_text().splitlines()
    found = map(json.loads, lines)
    return [each | {side: int(each[side].rpartition(":")[2]) - 1 for side in ("document", "kept")} for each in found]


def datasketch_rate(texts: list[str]) -> float:
    """Documents a second: signatures of word 5-grams, and LSH, as its documentation shows."""
    from datasketch import MinHash, MinHashLSH

    started = time.process_time()
    index = MinHashLSH(threshold=0.7, num_perm=128)
    for number, text in enumerate(texts):
        sketch = _sketch(MinHash, text)
        index.query(sketch)
        index.insert(number, sketch)
    return len(texts) / (time.process_time() - started)


def _sketch(kind, text: str):
    words = text.lower().split()
    sketch = kind(num_perm=128)
    sketch.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))])
    return sketch


def edited(draw: random.Random, words: list[str], share: float) -> list[str]:
    """The words with a share replaced."""
    words = list(words)
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = f"new{draw.randrange(10**6)}"
    return words


def recall(count: int, folder: pathlib.Path) -> list[str]:
    """A table of recall and precision by share of edits."""
    from datasketch import MinHash, MinHashLSH

    draw = random.Random(1)
    texts = [[f"w{min(int(draw.paretovariate(0.9)), 10**6):x}" for _ in range(300)] for _ in range(count)]
    rows, pairs = [" ".join(words) for words in texts], {}
    for share in SHARES:
        for number, words in enumerate(texts[: count // 4]):
            pairs[len(rows)] = (number, share)
            rows.append(" ".join(edited(draw, words, share)))
    path = folder / "recall.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    ours(path, folder, 1)
    found = removed(folder)
    hits = {each["document"] for each in found}
    index = MinHashLSH(threshold=0.7, num_perm=128)
    sketch_hits, sketch_false = set(), 0
    for number, row in enumerate(rows):
        sketch = _sketch(MinHash, row)
        family = pairs.get(number, (number, 0.0))[0]
        for other in index.query(sketch):
            same = pairs.get(other, (other, 0.0))[0] == family
            sketch_false += not same
            if same:
                sketch_hits.add(number)
        index.insert(number, sketch)
    lines = [f"{'edits':>6} {'ours':>8} {'datasketch LSH':>15} {'original rule':>14}"]
    for share in SHARES:
        own = [copy for copy, (_, each) in pairs.items() if each == share]
        original = sum(_characters(rows[copy], rows[pairs[copy][0]]) > 0.7 for copy in own)
        shown = [sum(copy in chosen for copy in own) / len(own) for chosen in (hits, sketch_hits)]
        lines.append(f"{share:6.0%} {shown[0]:8.1%} {shown[1]:15.1%} {original / len(own):14.1%}")
    family = {number: pairs.get(number, (number, 0.0))[0] for number in range(len(rows))}
    wrong = sum(family[each["document"]] != family[each["kept"]] for each in found)
    lines.append(f"false: ours {wrong} of {len(found)}; datasketch's unverified candidates {sketch_false}")
    return lines


def _characters(a: str, b: str) -> float:
    one, other = ({text[i : i + 5] for i in range(len(text) - 5)} for text in (a, b))
    return len(one & other) / len(one | other)


def clean_rates() -> tuple[float, float]:
    """(ours, ftfy and langdetect), documents a second of one core, on English with a few foreign texts."""
    import ftfy
    import langdetect

    sys.path.insert(0, str(ROOT))
    from megalith.curation.clean.corrections import fix_encoding
    from megalith.curation.clean.language import identify

    shared = ROOT.parent / "shared/data/dedup/cleaning_sample.jsonl"
    texts = [json.loads(line)["text"] for line in shared.read_text().splitlines()]
    identify("load the model")
    langdetect.detect("load the model")
    rates = []
    for steps in ((fix_encoding, identify), (ftfy.fix_text, langdetect.detect)):
        started = time.process_time()
        for text in texts:
            for step in steps:
                step(text)
        rates.append(len(texts) / (time.process_time() - started))
    return rates[0], rates[1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--recall", type=int, default=2000, help="texts of the table of recall")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = folder / "documents.jsonl"
        planted = synthetic(path, args.documents)
        size = path.stat().st_size / 1e6
        print(f"\ndedup: {args.documents:,} documents, {size:,.0f} MB, {len(planted):,} planted copies")
        used = ours(path, folder, args.workers)
        rate = args.documents / used["cpu"]
        print(f"ours: {used['seconds']:.1f} s with {args.workers} workers, {used['cpu']:.1f} s of CPU, "
              f"largest process {used['peak_mb']:.0f} MB; {rate:,.0f} documents/s/core")  # fmt: skip
        found = {each["document"] for each in removed(folder)}
        for low, high in ((0.01, 0.03), (0.03, 0.06), (0.06, 0.1)):
            own = [copy for copy, (_, share) in planted.items() if low <= share < high]
            share = sum(copy in found for copy in own) / max(1, len(own))
            print(f"  planted with {low:.0%} to {high:.0%} of words replaced: {share:.1%} found")
        print(f"  not planted, removed: {len(found - set(planted))}")
        with open(path) as file:
            texts = [json.loads(next(file))["text"] for _ in range(min(5000, args.documents))]
        peer = datasketch_rate(texts)
        print(f"datasketch: {peer:,.0f} documents/s/core; ours is {rate / peer:.1f} times that")
        print("\nrecall of copies with a share of their words replaced, at the default threshold")
        print("\n".join(recall(args.recall, folder)))
    fast, plain = clean_rates()
    peer = f"ftfy + langdetect {plain:.0f}; {fast / plain:.1f} times"
    print(f"\nclean (encoding and language): {fast:.0f} documents/s/core; {peer}")
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
