"""`megalith data dedup` and `clean` against their plain peers: time, peak memory, what is found.

    python benchmarks/corpus.py [--only speed recall clean line] [--documents 1000000] > benchmarks/results/corpus.txt

speed: synthetic documents of some 170 words (a Zipf distribution over 50,000 words), a tenth of them planted copies
with 1 to 10 % of their words replaced; ours is the whole command (two workers by default), from file to file, each
candidate verified. datasketch's MinHash of 128 values and its LSH, with the same shingles, run on a part of them in one
process: texts in memory, nothing verified, nothing written. Its bands are those that it chooses for the threshold, and
ours (32 of 4). It is measured before and after ours, because other work on a machine slows both.

recall: real books and articles, and copies of some with 1 to 30 % of their words edited (replaced, removed or added,
one as often as another), a corpus for each share, at the default threshold. "can" is the share of copies whose Jaccard
similarity is at the threshold or above, which nothing that keeps to the rule can surpass. Beside ours, datasketch as
above, unverified, and the rule of Megatron-LM's tools/openwebtext: 5-grams of characters, 100 hash functions in 10
bands, candidates verified, groups from a Jaccard similarity of 0.7. "characters" is ours with that rule's shingles,
--ngram-unit character. Recall is of copies that were linked with a text of their family; precision is of links.

clean: the whole command with ftfy and language identification, beside the original's steps written plainly: a loop over
lines with json, ftfy.fix_text and langdetect.detect.

line: a file with a line of 1 GB.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import itertools
import json
import pathlib
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.preprocess import machine, measured

SHARED = pathlib.Path(__file__).parents[2] / "shared/data"
SHARES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3)
MAX_PLANTED = 0.1
THRESHOLD = 0.7  # the default of `dedup`, and the original's
PACKAGES = ("numpy", "orjson", "rensa", "datasketch", "ftfy", "py3langid", "langdetect")
PUBLISHED = {"fastdedup": 1227, "marin": 4152}  # documents/s/core, on other machines, of other documents

Links = set[tuple[int, int]]


def synthetic(path: pathlib.Path, count: int, seed: int = 1) -> dict[int, tuple[float, float]]:
    """Write so many documents; returns {copy: (share of words replaced, Jaccard similarity with its source)}."""
    draw = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i:x}" for i in range(50_000)])
    weights = 1 / np.arange(10, 50_010)
    weights /= weights.sum()
    planted: dict[int, tuple[float, float]] = {}
    with open(path, "wb") as out:
        number = 0
        while number < count:
            lengths = draw.integers(100, 240, 1000)
            words = vocabulary[draw.choice(len(vocabulary), lengths.sum(), p=weights)]
            texts = np.split(words, np.cumsum(lengths)[:-1])
            rows = list(texts)
            for text in texts[::9]:
                share = float(draw.uniform(0.01, MAX_PLANTED))
                copy = text.copy()
                places = draw.choice(len(copy), max(1, round(share * len(copy))), replace=False)
                copy[places] = vocabulary[draw.integers(0, len(vocabulary), len(places))]
                one, other = (set(zip(*(words.tolist()[i:] for i in range(5)))) for words in (text, copy))
                planted[number + len(rows)] = (share, len(one & other) / len(one | other))
                rows.append(copy)
            for text in rows[: count - number]:
                out.write(json.dumps({"text": " ".join(text)}).encode() + b"\n")
            number += len(rows)
    return {copy: found for copy, found in planted.items() if copy < count}


def megalith(verb: str, path: pathlib.Path, output: pathlib.Path, *flags: str) -> dict:
    """The whole command: what `measured` gives, and the report."""
    words = ["data", verb, "--input", str(path), "--output", str(output), "--overwrite", *flags]
    result = measured([sys.executable, "-m", "megalith", *words])
    return result | {"report": json.loads(pathlib.Path(f"{output}.report.json").read_text())["steps"][0]}


def removed(output: pathlib.Path) -> Iterator[tuple[int, int]]:
    """(document, the one that it was linked with) of the evidence, from 0."""
    for line in pathlib.Path(f"{output}.removed.jsonl").read_text().splitlines():
        found = json.loads(line)
        names = found["document"], found.get("linked_to", found["kept"])
        yield tuple(int(name.rpartition(":")[2]) - 1 for name in names)  # type: ignore[misc]


def words_5(text: str) -> list[bytes]:
    """Shingles of five words, as ours are but for punctuation, which these texts' words keep."""
    words = text.lower().split()
    return [" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))]


def characters_5(text: str) -> list[bytes]:
    """Shingles of five characters, without the last, as the original has them."""
    return [text[i : i + 5].encode() for i in range(len(text) - 5)]


class Datasketch:
    """Signatures and LSH as its documentation shows them. bands: (bands, rows); those it chooses for THRESHOLD."""

    def __init__(self, shingles: Callable = words_5, num_perm: int = 128, bands: tuple[int, int] | None = None):
        """An index of nothing yet."""
        from datasketch import MinHashLSH

        self.shingles, self.num_perm, self.size = shingles, num_perm, 0
        self.index = MinHashLSH(threshold=THRESHOLD, num_perm=num_perm, params=bands)

    def links(self, texts: Sequence[str], first: int, insert: bool) -> Links:
        """Candidates of texts that are numbered from `first`; insert: later ones are compared with them."""
        from datasketch import MinHash

        links: Links = set()
        for number, text in enumerate(texts, first):
            sketch = MinHash(num_perm=self.num_perm)
            sketch.update_batch(self.shingles(text))
            links.update((number, other) for other in self.index.query(sketch))
            if insert:
                self.index.insert(number, sketch)
        return links

    def rate(self, texts: Sequence[str]) -> float:
        """Documents per CPU second."""
        started = time.process_time()
        self.links(texts, 0, True)
        return len(texts) / (time.process_time() - started)


def jaccard(a: Sequence[bytes], b: Sequence[bytes]) -> float:
    """Of two lists of shingles."""
    one, other = set(a), set(b)
    return len(one & other) / len(one | other)


def hit(found: set[int], wanted: Sequence[int]) -> str:
    """The share of the wanted that were found."""
    return f"{sum(each in found for each in wanted) / max(1, len(wanted)):.2%}"


def speed(documents: int, sample: int, workers: int, folder: pathlib.Path) -> Iterator[str]:
    """Lines on time, memory and recall at size."""
    path, output = folder / "documents.jsonl", folder / "unique.jsonl"
    planted = synthetic(path, documents)
    yield f"dedup: {documents:,} documents, {path.stat().st_size / 1e6:,.0f} MB, {len(planted):,} planted copies"
    with open(path) as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, sample)]

    def peers() -> tuple[float, float]:
        return Datasketch().rate(texts), Datasketch(bands=(32, 4)).rate(texts)

    before = peers()
    used = megalith("dedup", path, output, "--workers", str(workers), "--over-budget", "warn")
    after = peers()
    rate = documents / used["cpu"]
    together, anonymous = f"{used['peak MB']:,.0f} MB", f"{used['anonymous MB']:,.0f} MB"
    yield (
        f"ours, {workers} workers: {used['wall']:.1f} s, {used['cpu']:.1f} s of CPU, {rate:,.0f} documents/s/core\n"
        f"  all processes together {together} at most, {anonymous} without mapped files"
    )
    steps = used["report"]["seconds"]
    yield "  seconds: " + ", ".join(f"{name} {steps[name]:.1f}" for name in ("sign", "groups", "evidence", "filter"))
    found = {document for document, _ in removed(output)}
    alike = [copy for copy, (_, similarity) in planted.items() if similarity >= THRESHOLD]
    yield f"  planted with a similarity of {THRESHOLD} or more: {len(alike):,}, {hit(found, alike)} found"
    for low, high in ((0.01, 0.03), (0.03, 0.06), (0.06, MAX_PLANTED)):
        own = [copy for copy, (share, _) in planted.items() if low <= share < high]
        yield f"  planted with {low:.0%} to {high:.0%} of words replaced: {hit(found, own)} found"
    yield f"  not planted, removed: {len(found - set(planted))}"
    for name, one, other in zip(("its bands for 0.7", "32 bands of 4"), before, after):
        times = rate / max(one, other)
        yield f"datasketch, {name}: {one:,.0f} and {other:,.0f} documents/s/core; ours is {times:.1f} times the faster"
    listed = (f"{name} {value:,} ({rate / value:.1f} times)" for name, value in PUBLISHED.items())
    yield f"published, documents/s/core: {', '.join(listed)}"


def edited(draw: random.Random, text: str, share: float, other: Sequence[str]) -> str:
    """The text with a share of its words replaced, removed or followed by another."""
    words = text.split(" ")
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = draw.choice((draw.choice(other), "", f"{words[place]} {draw.choice(other)}"))
    return " ".join(word for word in words if word)


def real_texts() -> list[str]:
    """Books and articles, each once."""
    with gzip.open(SHARED / "loose_json/gutenberg_docs.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    articles = (SHARED / "loose_json/wikitext2_test_articles.jsonl").read_text().splitlines()
    return list(dict.fromkeys([*texts, *(json.loads(line)["text"] for line in articles)]))


def recall(copies: int, folder: pathlib.Path) -> Iterator[str]:
    """A table of recall and precision by share of edits."""
    texts = real_texts()
    other = sorted(set(itertools.chain.from_iterable(text.split()[:200] for text in texts)))
    peers = (Datasketch(), Datasketch(characters_5, 100, (10, 10)))
    among_texts = [peer.links(texts, 0, True) for peer in peers]
    yield f"recall: {len(texts):,} texts, and copies of {copies} of them for each share; recall and precision"
    yield f"{'edits':>6} {'can':>6} {'ours':>15} {'datasketch':>15} {'original':>15} {'characters':>15}"
    for share in SHARES:
        draw = random.Random(round(share * 100))
        sources = draw.sample(range(len(texts)), copies)
        rows = texts + [edited(draw, texts[source], share, other) for source in sources]
        family = [*range(len(texts)), *sources]
        path, output = folder / "recall.jsonl", folder / "recall.out"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        ours = []
        for unit in ("word", "character"):
            megalith("dedup", path, output, "--over-budget", "warn", "--workers", "1", "--ngram-unit", unit)
            ours.append(set(removed(output)))
        of_copies = (peer.links(rows[len(texts) :], len(texts), False) for peer in peers)
        candidates, unverified = (known | new for known, new in zip(among_texts, of_copies))
        original = {(a, b) for a, b in unverified if jaccard(*map(characters_5, (rows[a], rows[b]))) >= THRESHOLD}
        can = [jaccard(words_5(rows[len(texts) + i]), words_5(texts[j])) >= THRESHOLD for i, j in enumerate(sources)]
        shown = []
        for links in (ours[0], candidates, original, ours[1]):
            right = {(a, b) for a, b in links if family[a] == family[b]}
            hits = {number for link in right for number in link if number >= len(texts)}
            precision = f"{len(right) / len(links):.1%}" if links else "-"
            shown.append(f"{len(hits) / copies:7.1%} {precision:>7}")
        yield f"{share:6.0%} {np.mean(can):6.1%} {' '.join(shown)}"


def plain_clean(path: str, output: str) -> None:
    """The original's steps: ftfy, then what is not English goes."""
    import ftfy
    import langdetect

    with open(path) as lines, open(output, "w") as out:
        for line in lines:
            record = json.loads(line)
            record["text"] = ftfy.fix_text(record["text"])
            try:
                language = langdetect.detect(record["text"])
            except langdetect.LangDetectException:
                continue
            if language == "en":
                out.write(json.dumps(record, ensure_ascii=False) + "\n")


def clean(folder: pathlib.Path) -> Iterator[str]:
    """Lines on the speed of cleaning."""
    path = folder / "dirty.jsonl"
    sample = (SHARED / "dedup/cleaning_sample.jsonl").read_text()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in real_texts()) + sample)
    rules = ("--rules", "ftfy", "language", "--language", "en", "--workers", "1")
    used = megalith("clean", path, folder / "clean.jsonl", *rules)
    plain = measured([sys.executable, __file__, "--plain-clean", str(path), str(folder / "plain.jsonl")])
    count = used["report"]["documents"]
    yield f"clean: {count:,} documents, {path.stat().st_size / 1e6:,.0f} MB, ftfy and English alone"
    for name, result, output in (("ours", used, "clean.jsonl"), ("plain", plain, "plain.jsonl")):
        kept = len((folder / output).read_text().splitlines())
        yield f"{name:>6}: {result['cpu']:6.1f} s of CPU, {count / result['cpu']:6,.0f} documents/s/core, {kept:,} kept"
    yield f"ours is {plain['cpu'] / used['cpu']:.1f} times as fast"


def long_line(folder: pathlib.Path) -> Iterator[str]:
    """A line on a line of 1 GB between two documents."""
    path, output = folder / "long.jsonl", folder / "long.out"
    good = b'{"text": "a good document"}\n'
    with open(path, "wb") as file:
        file.write(good + b'{"text": "')
        for _ in range(1 << 10):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + good)
    used = megalith("ids", path, output, "--max-unusable", "0.5")
    told = used["report"]["problems"][0].rpartition("/")[2]
    yield (
        f"a line of {path.stat().st_size / 1e9:.2f} GB: {used['wall']:.1f} s, all processes together "
        f"{used['peak MB']:,.0f} MB at most; {len(output.read_text().splitlines())} documents stay; told: {told}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("speed", "recall", "clean", "line")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=10_000, help="of them for datasketch")
    parser.add_argument("--copies", type=int, default=300, help="copies for each share of edits in the table of recall")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain-clean", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain_clean:
        return plain_clean(*args.plain_clean)
    print(f"command: python {shlex.join(sys.argv)}\n{time.strftime('%Y-%m-%d %H:%M')} {machine()}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        parts = {
            "speed": lambda: speed(args.documents, args.sample, args.workers, folder),
            "recall": lambda: recall(args.copies, folder),
            "clean": lambda: clean(folder),
            "line": lambda: long_line(folder),
        }
        for part in args.only:
            print(flush=True)
            for line in parts[part]():
                print(line, flush=True)


if __name__ == "__main__":
    main()
