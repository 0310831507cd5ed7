"""A store of random vectors: how long it takes to write, to search exactly and by FAISS, and the memory at its peak.

    python benchmarks/retrieval.py --rows 1000000 --width 128 --index-string Flat IVF1024,Flat IVF1024,PQ32 HNSW32
    python benchmarks/retrieval.py --rows 100000                 # a question in how many milliseconds

Prints a JSON line for each measurement; the logs are in benchmarks/results. peak_mib is the most memory since the last
line, files that are mapped among it. Recall is that of the 20 nearest against the exact search, as FAISS searches by
itself (nprobe 1, efSearch 16), and with --effort: lists that are read, or candidates that are kept.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np
import torch

from megalith.retrieval import store
from megalith.retrieval.search import ExactIndex, FaissIndex, build_faiss, measure_recall
from megalith.retrieval.store import Plan, Store


def peak_mebibytes() -> float:
    """Of this process since the last call (Linux)."""
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024


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


def timed(index: ExactIndex | FaissIndex, found: Store, repeat: int) -> dict[str, float]:
    """Median seconds of a search of one question, and of its CPU time, which other programs change less."""
    times, work = [], []
    for number in range(repeat):
        query = torch.from_numpy(found.vectors(np.array([number * 37 % len(found)])))
        start, begun = time.perf_counter(), time.process_time()
        index.search(query, 20)
        times.append(time.perf_counter() - start)
        work.append(time.process_time() - begun)
    return {"seconds": statistics.median(times), "cpu_seconds": round(statistics.median(work), 5)}


def main() -> None:
    """Write, search, build indices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--shard-rows", type=int, default=65536)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--effort", type=int, default=16, help="nprobe, and a quarter of efSearch")
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
            searched = timed(index, found, args.repeat)
            report(f"exact search of one question, cache {cache}, median", **searched)
        del index
        for name in args.index_string:
            start, begun = time.perf_counter(), time.process_time()
            approximate = build_faiss(found, name)
            cpu = round(time.process_time() - begun, 1)
            mib = round(approximate.path.stat().st_size / 2**20)
            report(f"build {name}", time.perf_counter() - start, cpu_seconds=cpu, file_mib=mib)
            for effort in (None, args.effort):
                if effort:
                    approximate.set_options(nprobe=effort, efSearch=4 * effort)
                recall = round(measure_recall(found, approximate), 4)
                searched = timed(approximate, found, args.repeat)
                report(f"search of one question, {name}, effort {effort}, median", **searched, recall=recall)
            del approximate


if __name__ == "__main__":
    main()
