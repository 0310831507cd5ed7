"""`megalith data preprocess` against the classic design and against bare `tokenizers`, on real text of this machine.

    python benchmarks/preprocess.py --gpt2 FOLDER --bert VOCAB [--megabytes 200] [--gigabyte] \\
        > benchmarks/results/preprocess.txt

classic: a pool of 2 processes, one document a call through `tokenizers`, ids pickled back and written by one process
(Megatron's tool with faster libraries: its own nltk splitter and Python BPE are slower). bare: `encode_batch_fast` of
`tokenizers` over the same documents, texts in memory, nothing written. ours: the whole command. Each is a separate
process; wall seconds, CPU seconds and peak memory are those of the process and its children.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import orjson

ROOT = pathlib.Path(__file__).parents[1]
PLACES = (
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/include",
    "/usr/lib/python3",
    "/usr/share",
    "/usr/local/lib",
    "/usr/lib",
)
SUFFIXES = {
    ".py",
    ".pyi",
    ".h",
    ".hpp",
    ".c",
    ".txt",
    ".md",
    ".rst",
    ".pm",
    ".pl",
    ".tex",
    ".html",
    *(f".{i}" for i in range(1, 9)),
}


def corpus_files() -> Iterator[pathlib.Path]:
    """Sources, documentation and manual pages of this machine, small and large folders in turn."""
    places = [sys.prefix, os.path.dirname(os.__file__), *PLACES]
    streams = [_below(place) for place in dict.fromkeys(map(os.path.realpath, places)) if os.path.isdir(place)]
    for row in itertools.zip_longest(*streams):
        yield from (path for path in row if path)


def _below(place: str) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(place):
        folders.sort()
        for name in sorted(names):
            path = pathlib.Path(folder, name)
            kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            if (
                (kind in SUFFIXES or name in ("copyright", "changelog.gz", "changelog.Debian.gz"))
                and path.is_file()
                and not path.is_symlink()
            ):
                yield path


def assemble(target: pathlib.Path, megabytes: int) -> dict:
    """Write JSON lines of about so many MB of UTF-8 text, no document twice; returns counts."""
    seen, size, documents = set(), 0, 0
    with open(target, "wb") as out:
        for path in corpus_files():
            try:
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                text = data.decode("utf-8")
            except (OSError, ValueError, EOFError):
                continue
            digest = hashlib.sha256(b"".join(data.split())).digest()
            if len(data) < 200 or len(data) > 2_000_000 or digest in seen:
                continue
            seen.add(digest)
            out.write(orjson.dumps({"text": text, "path": str(path)}) + b"\n")
            size, documents = size + len(data), documents + 1
            if size >= megabytes * 1_000_000:
                break
    return {"megabytes": size / 1e6, "documents": documents, "file megabytes": target.stat().st_size / 1e6}


def plain_tokenizer(kind: str, files: list[str]):
    """The `tokenizers` object that classic and bare use."""
    sys.path.insert(0, str(ROOT))
    from megalith.data.tokenizers.tokenizer import build_tokenizer

    names = ("vocab_file", "merge_file")
    return build_tokenizer(kind, **dict(zip(names, files)))


class Classic:
    """One document a call."""

    @classmethod
    def start(cls, kind: str, files: list[str], split: bool) -> None:
        """Load tokenizer and splitter in a worker."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        cls.tokenizer = plain_tokenizer(kind, files)
        cls.split = None
        if split:
            from megalith.data.corpus.sentences import sentence_splitter

            cls.split = sentence_splitter("english")

    @classmethod
    def encode(cls, line: bytes) -> tuple[list[list[int]], int]:
        """Ids of each sentence (or of the document) of a JSON line."""
        text = json.loads(line)["text"]
        sentences = cls.split(text) if cls.split else [text]
        encode = cls.tokenizer.backend.encode
        rows = [ids for sentence in sentences if (ids := encode(sentence, add_special_tokens=False).ids)]
        if cls.split is None and rows:
            rows[-1].append(cls.tokenizer.eod)
        return rows, len(line)


def classic(corpus: str, kind: str, files: list[str], split: bool, workers: int) -> int:
    """The classic design; returns tokens."""
    tokens, lengths, documents = 0, [], [0]
    with open(corpus, "rb") as lines, open(corpus + ".classic.bin", "wb") as out:
        with multiprocessing.get_context("spawn").Pool(workers, Classic.start, (kind, files, split)) as pool:
            for rows, _ in pool.imap(Classic.encode, lines, 32):
                for row in rows:
                    out.write(np.array(row, np.uint16).tobytes())
                    lengths.append(len(row))
                    tokens += len(row)
                documents.append(len(lengths))
    np.save(corpus + ".classic.npy", np.array(lengths, np.int32))
    return tokens


def bare(corpus: str, kind: str, files: list[str]) -> dict:
    """encode_batch_fast over all documents, in batches of 512, both cores; seconds of these calls alone."""
    backend, seconds, tokens, size = plain_tokenizer(kind, files).backend, 0.0, 0, 0
    with open(corpus, "rb") as lines:
        while batch := [orjson.loads(line)["text"] for line in itertools.islice(lines, 512)]:
            size += sum(len(text.encode()) for text in batch)
            started = time.perf_counter()
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
            seconds += time.perf_counter() - started
            tokens += sum(len(encoding) for encoding in encodings)
    return {"seconds": seconds, "tokens": tokens, "text megabytes": size / 1e6}


def measured(command: list[str]) -> dict:
    """Run a process; wall and CPU seconds, peak memory in MB of all its processes (sampled), last line of output."""
    started = time.perf_counter()
    before = os.times()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    peak = {"sum": 0.0, "largest": 0.0, "anonymous": 0.0}
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{out}\n{err}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "wall": seconds,
        "cpu": cpu,
        "peak MB": peak["sum"],
        "largest process MB": peak["largest"],
        "anonymous MB": peak["anonymous"],
        "out": out.strip(),
        "err": err.strip(),
    }


def _watch(process: subprocess.Popen, peak: dict) -> None:
    import psutil

    try:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            family = [parent, *parent.children(recursive=True)]
            sizes, anonymous = [], 0.0
            for member in family:
                try:
                    # Unique and shared-by-share memory: what mapping a file twice really takes.
                    sizes.append(member.memory_full_info().pss / 1e6)
                    rollup = pathlib.Path(f"/proc/{member.pid}/smaps_rollup").read_text()
                    anonymous += int(re.findall(r"Anonymous:\s+(\d+)", rollup)[0]) / 1e3  # of no file
                except (psutil.Error, OSError, IndexError):
                    continue
            peak["sum"], peak["largest"] = max(peak["sum"], sum(sizes)), max([peak["largest"], *sizes])
            peak["anonymous"] = max(peak["anonymous"], anonymous)
            time.sleep(0.1)
    except psutil.Error:
        return


def ours(corpus: str, kind: str, files: list[str], split: bool, workers: int) -> dict:
    """The whole command."""
    prefix = f"{corpus}.ours"
    flags = ["--vocab-file", files[0], *(["--merge-file", files[1]] if len(files) > 1 else [])]
    flags += ["--split-sentences"] if split else ["--append-eod"]
    command = [
        sys.executable,
        "-m",
        "megalith",
        "data",
        "preprocess",
        "--input",
        corpus,
        "--output-prefix",
        prefix,
        "--workers",
        str(workers),
    ]
    result = measured([*command, "--tokenizer-type", kind, *flags, "--overwrite"])
    return result | json.loads(pathlib.Path(prefix + "_preprocess.json").read_text())["result"]


def same_tokens(corpus: str, level: str) -> bool:
    """Whether classic and ours wrote the same tokens."""
    made = [np.memmap(path, np.uint16, "r") for path in (corpus + ".classic.bin", f"{corpus}.ours_text_{level}.bin")]
    return made[0].size == made[1].size and all(
        np.array_equal(made[0][i : i + (1 << 24)], made[1][i : i + (1 << 24)]) for i in range(0, made[0].size, 1 << 24)
    )


def compare(corpus: str, kind: str, files: list[str], split: bool, workers: int) -> None:
    """One table: classic, bare, ours."""
    size = os.path.getsize(corpus) / 1e6
    self_command = [
        sys.executable,
        __file__,
        "--corpus",
        corpus,
        "--kind",
        kind,
        "--files",
        *files,
        "--workers",
        str(workers),
    ]
    self_command += ["--split"] if split else []
    print(
        f"\n{kind}, {workers} workers{', sentences split' if split else ', --append-eod'}; {size:.0f} MB of JSON lines"
    )
    print(f"{'':22} {'wall s':>8} {'MB/s':>8} {'CPU s':>8} {'MB/CPU s':>9} {'peak MB':>8}")

    def row(name: str, result: dict, seconds: float) -> float:
        memory = f"{result['peak MB']:8.0f}"
        print(
            f"{name:22} {seconds:8.1f} {size / seconds:8.1f} {result['cpu']:8.1f} {size / result['cpu']:9.2f} {memory}",
            flush=True,
        )
        return seconds

    mine_first = ours(corpus, kind, files, split, workers)
    row("ours, first run", mine_first, mine_first["wall"])
    classic_run = measured([*self_command, "--only", "classic"])
    classic_seconds = row("classic", classic_run, classic_run["wall"])
    bare_seconds = None
    if not split:
        bare_run = measured([*self_command, "--only", "bare"])
        inner = json.loads(bare_run["out"].splitlines()[-1])
        bare_seconds = row("bare encode_batch_fast", bare_run, inner["seconds"])
    mine = ours(corpus, kind, files, split, workers)
    seconds = row("ours, second run", mine, mine["wall"])
    slower = max(seconds, mine_first["wall"])
    level = "sentence" if split else "document"
    against = f" and {bare_seconds / slower:.1f} x bare" if bare_seconds else ""
    print(f"ours (slower run) is {classic_seconds / slower:.1f} x classic{against}", end="; ")
    print(f"CPU seconds: {classic_run['cpu'] / mine['cpu']:.1f} x classic; same tokens: {same_tokens(corpus, level)}")
    shares(mine)


def shares(result: dict) -> None:
    """Where the workers' seconds went."""
    working = {stage: value for stage, value in result["seconds"].items() if stage != "joining"}
    total = sum(working.values())
    print(
        "workers' time: " + ", ".join(f"{stage} {value / total:.0%}" for stage, value in working.items() if value),
        end="; ",
    )
    print(f"joining the parts {result['seconds']['joining']:.2f} s")
    print(
        f"{result['documents']} documents, {result['sequences']} sequences, {result['tokens']} tokens; "
        f"{result['encoder']}"
    )


def machine() -> str:
    """The machine in a line."""
    names = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    cores = f"{os.cpu_count()} cores ({names[0] if names else 'unknown'})"
    return f"{platform.platform()}, {cores}, load {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    """Assemble, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt2", help="folder with vocab.json and merges.txt")
    parser.add_argument("--bert", help="BERT's vocab.txt (uncased)")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--gigabyte", action="store_true", help="also run 1 GB, for the memory")
    parser.add_argument("--folder", default="/tmp/megalith-preprocess", help="where the corpus and the results go")
    parser.add_argument("--workers", type=int, default=2)
    for name in ("--only", "--corpus", "--kind"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--split", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "classic":
        print(classic(args.corpus, args.kind, args.files, args.split, args.workers))
        return
    if args.only == "bare":
        print(json.dumps(bare(args.corpus, args.kind, args.files)))
        return
    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / f"corpus{args.megabytes}.jsonl"
    if not corpus.exists():
        print(json.dumps(assemble(corpus, args.megabytes)), file=sys.stderr)
    print(f"{time.strftime('%Y-%m-%d %H:%M')} {machine()}")
    gpt2 = [os.path.join(args.gpt2, name) for name in ("vocab.json", "merges.txt")]
    if args.gpt2:
        compare(str(corpus), "GPT2BPETokenizer", gpt2, False, args.workers)
    if args.bert:
        compare(str(corpus), "BertWordPieceLowerCase", [args.bert], True, args.workers)
    if args.gigabyte:
        large = folder / "corpus1000.jsonl"
        if not large.exists():
            assemble(large, 1000)
        print(f"\n1 GB: {large.stat().st_size / 1e6:.0f} MB of JSON lines")
        for kind, files, split in (("GPT2BPETokenizer", gpt2, False), ("BertWordPieceLowerCase", [args.bert], True)):
            result = ours(str(large), kind, files, split, args.workers)
            rate = large.stat().st_size / 1e6 / result["wall"]
            print(
                f"{kind}: {result['wall']:.1f} s, {rate:.1f} MB/s, all processes together {result['peak MB']:.0f} MB "
                f"at most"
            )


if __name__ == "__main__":
    main()
