"""A store of random vectors: how long it takes to write, to search exactly and by FAISS, and the memory at its peak.

    python benchmarks/retrieval.py --rows 1000000 --width 128 --index-string IVF1024,Flat HNSW32
    python benchmarks/retrieval.py --rows 100000                 # a question in how many milliseconds

Prints a JSON line for each measurement; the logs are in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time

import numpy as np
import torch

from megalith.retrieval import store
from megalith.retrieval.search import ExactIndex, build_faiss, measure_recall
from megalith.retrieval.store import Plan, Store


def peak_mebibytes() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(what: str, seconds: float, **more: float) -> None:
    """Print a measurement."""
    print(
        json.dumps({"what": what, "seconds": round(seconds, 4), "peak_mib": round(peak_mebibytes()), **more}),
        flush=True,
    )


def write(folder: str, rows: int, width: int, shard_rows: int) -> Store:
    """A store of vectors in clusters, as those of texts are."""
    centres = np.random.RandomState(0).randn(1000, width).astype(np.float32)
    plan = Plan(rows, width, shard_rows, ("id",), {"kind": "random"})
    for shard in store.begin(folder, plan):
        here, random = plan.range_of(shard), np.random.RandomState(shard + 1)
        vectors = centres[random.randint(0, len(centres), len(here))]
        vectors += 0.5 * random.randn(*vectors.shape).astype(np.float32)
        store.write_shard(folder, shard, vectors, np.arange(here.start, here.stop)[:, None])
    return Store(folder)


def main() -> None:
    """Write, search, build indices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--shard-rows", type=int, default=65536)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--index-string", nargs="*", default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = write(folder, args.rows, args.width, args.shard_rows)
        report("write", time.perf_counter() - start, rows=args.rows)
        for cache in (False, True):
            start = time.perf_counter()
            index = ExactIndex(found, cache)
            report(f"open, cache {cache}", time.perf_counter() - start)
            times, work = [], []
            for number in range(args.repeat):
                query = torch.from_numpy(found.vectors(np.array([number * 37 % args.rows])))
                start, begun = time.perf_counter(), time.process_time()
                index.search(query, 20)
                times.append(time.perf_counter() - start)
                work.append(time.process_time() - begun)
            # that of all cores, which other programs on the machine do not change
            cpu = round(sorted(work)[len(work) // 2], 4)
            report(
                f"exact search of one question, cache {cache}, median", sorted(times)[len(times) // 2], cpu_seconds=cpu
            )
        del index
        for name in args.index_string:
            start = time.perf_counter()
            approximate = build_faiss(found, name)
            report(f"build {name}", time.perf_counter() - start)
            report(f"recall of 20, {name}", 0.0, recall=round(measure_recall(found, approximate), 4))
            query = torch.from_numpy(found.vectors(np.array([5])))
            start = time.perf_counter()
            approximate.search(query, 20)
            report(f"search of one question, {name}", time.perf_counter() - start)


if __name__ == "__main__":
    main()
