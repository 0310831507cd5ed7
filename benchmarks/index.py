"""Sample indices, random access and blends, beside megatron-core's own in the same run.

    python benchmarks/index.py            writes benchmarks/results/index.txt (about five minutes on a quiet machine)
    python benchmarks/index.py --quick    a hundredth of the size, to see that it works; writes nothing

Each measurement runs in a separate process, so that peak memory means something; megalith and Megatron core alternate,
and medians are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "index.txt"
SEQUENCE, SEED = 2048, 1234


def write_corpus(folder: pathlib.Path, documents: int) -> None:
    """An index of `documents` documents of about 600 tokens; the .bin is sparse, since indices do not read it."""
    from megalith.data.indexed.format import DTYPE_CODES, HEADER, MAGIC

    lengths = np.random.default_rng(0).integers(100, 1100, documents).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    with open(folder / "big.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[np.dtype(np.uint16)], documents, documents + 1))
        for table in (lengths, ends - 2 * lengths, np.arange(documents + 1)):
            table.tofile(file)
    with open(folder / "big.bin", "wb") as file:
        file.truncate(int(ends[-1]))


def core_dataset(folder: pathlib.Path, num_samples: int, cache: pathlib.Path, mask: bool):
    """megatron-core's GPTDataset over the corpus; `mask`: whether it builds the attention mask, its default."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 50257, 50256, -1, {}

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE,
        blend=([str(folder / "big")], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=mask,
    )
    data = GPTDataset.build_low_level_dataset(str(folder / "big"), config)
    documents = np.arange(len(data.sequence_lengths), dtype=np.int32)
    return lambda: GPTDataset(data, str(folder / "big"), documents, num_samples, Split.train, config)


def our_dataset(folder: pathlib.Path, num_samples: int, cache: pathlib.Path):
    """Our GPTDataset over the same corpus."""
    from megalith.data.indexed import IndexedDataset
    from megalith.data.samples.gpt_dataset import GPTDataset

    data = IndexedDataset(folder / "big")
    return lambda: GPTDataset(
        data, None, num_samples, seq_length=SEQUENCE, seed=SEED, vocab_size=50257, cache_folders=[cache]
    ).prepare()


def two_epochs(folder: pathlib.Path) -> int:
    """Samples that need two whole epochs of the corpus."""
    return ((folder / "big.bin").stat().st_size // 2 * 2 - 1) // SEQUENCE


def measure(what: str, folder: pathlib.Path) -> dict[str, float]:
    """One measurement, in the process that calls this."""
    cache = pathlib.Path(tempfile.mkdtemp(dir=folder))
    if what.startswith("index"):
        build = (our_dataset if "ours" in what else lambda *a: core_dataset(*a, mask=False))(
            folder, two_epochs(folder), cache
        )
        before, begin, used = peak(), time.perf_counter(), time.process_time()
        dataset = build()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - used
        return {"seconds": seconds, "cpu seconds": cpu, "peak MB above start": peak() - before, "samples": len(dataset)}
    if what.startswith("samples"):
        few = 20_000
        build = (
            our_dataset(folder, few, cache)
            if "ours" in what
            else core_dataset(folder, few, cache, mask="with mask" in what)
        )
        dataset, order = build(), np.random.default_rng(1).integers(0, few, 2000).tolist()
        rates = {}
        # The first time the kernel maps the pages, which costs either side the same
        for name in (
            "pages untouched",
            "again",
        ):
            begin = time.process_time()
            for index in order:
                dataset[index]
            rates[f"samples per cpu second, {name}"] = len(order) / (time.process_time() - begin)
        return rates
    if what.startswith("blend"):
        return blend(what, 100_000_000 if (folder / "full").exists() else 1_000_000)
    return many_files(folder)


def blend(what: str, size: int) -> dict[str, float]:
    """A blend of 200 sources."""
    from megalith.data.samples.blend import blend_index, normalize

    shares = normalize(np.random.default_rng(2).random(200))
    if "ours" not in what:
        from megatron.core.datasets import helpers_cpp

    before, begin, used = peak(), time.perf_counter(), time.process_time()
    if "ours" in what:
        sources = blend_index(shares, size).sources
    else:
        sources, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers_cpp.build_blending_indices(sources, numbers, shares, 200, size, False)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - used
    check = int(np.sum(sources.astype(np.int64) * (np.arange(size) % 1_000_003)))
    return {"seconds": seconds, "cpu seconds": cpu, "peak MB above start": peak() - before, "checksum": check}


def many_files(folder: pathlib.Path) -> dict[str, float]:
    """Open, check, index and blend many small files."""
    from megalith.config.run import RunConfig
    from megalith.data.build import build_datasets

    config = RunConfig().replace(
        data_path=[str(folder / "many")], split="98,1,1", seq_length=256, global_batch_size=64, train_iters=10_000
    )
    begin = time.perf_counter()
    built = build_datasets(config.replace(data_cache_path=str(folder / "cache"), eval_iters=1), None)
    opened = time.perf_counter() - begin
    for index in range(0, len(built["train"]), 640):
        built["train"][index]
    return {
        "files": len(built["train"].datasets),
        "seconds to open, index, blend": opened,
        "with 1000 samples read": time.perf_counter() - begin,
    }


def write_many(folder: pathlib.Path, files: int) -> None:
    """`files` datasets of 100 documents."""
    from megalith.data.indexed import IndexedWriter

    random = np.random.default_rng(3)
    (folder / "many").mkdir()
    for number in range(files):
        lengths = random.integers(50, 500, 100)
        with IndexedWriter(folder / "many" / f"part-{number:04}", np.uint16) as writer:
            writer.add_many(random.integers(0, 50000, lengths.sum()), lengths)


def peak() -> float:
    """Peak resident memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions() -> str:
    """The machine and what the numbers depend on."""
    import importlib.metadata as metadata

    model = "unknown"
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        model = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "megatron-core"))
    return f"{time.strftime('%Y-%m-%d')}, {model}, {load}, Python {platform.python_version()}, {packages}"


def main() -> None:
    """Run every measurement and write the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.measure:
        print(json.dumps(measure(options.measure[0], pathlib.Path(options.measure[1]))))
        return
    folder = pathlib.Path(tempfile.mkdtemp(prefix="megalith-index-"))
    lines = [
        f"command: python benchmarks/index.py\nmachine: {versions()}",
        "medians of 5 (blend: 1); 2 million documents, 1.2 billion tokens, 2 epochs",
    ]
    try:
        write_corpus(folder, 20_000 if options.quick else 2_000_000)
        write_many(folder, 25 if options.quick else 2_500)
        if not options.quick:
            (folder / "full").touch()
        for kinds, times in (
            (("index, ours", "index, megatron-core"), 5),
            (
                (
                    "samples, ours",
                    "samples, megatron-core with mask (its default)",
                    "samples, megatron-core without mask",
                ),
                5,
            ),
            (("blend of 200 sources, ours", "blend of 200 sources, megatron-core"), 1),
            (("many files",), 3),
        ):
            for kind, numbers in medians(kinds, 1 if options.quick else times, folder).items():
                line = f"{kind:48} " + "  ".join(f"{name} {value:.6g}" for name, value in numbers.items())
                print(line, flush=True)
                lines.append(line)
    finally:
        shutil.rmtree(folder)
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n")


def medians(kinds: tuple[str, ...], times: int, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Each kind measured `times` times, in turn, in a fresh process; the median of every number."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(times):
        for kind in kinds:
            command = [sys.executable, "-W", "ignore", __file__, "--measure", kind, str(folder)]
            found[kind].append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            )
    return {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for kind, rows in found.items()
    }


if __name__ == "__main__":
    main()
