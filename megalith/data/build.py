"""Config in, training, validation and test datasets out."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.common import units
from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.memory import available_memory
from megalith.common.registry import Registry
from megalith.config.batch_math import global_batch
from megalith.config.run import RunConfig
from megalith.config.sections.data import DataConfig, shares
from megalith.data.indexed.tntidx import open_indexed
from megalith.data.samples.blend import normalised, request
from megalith.data.samples.blended import Blended, Corpus, Endless, prepare
from megalith.data.samples.index_cache import default_folders
from megalith.data.samples.splits import NAMES, split_bounds
from megalith.data.source_checks import check_some_tokens, check_source
from megalith.data.sources import Source, read_list, sources_of

# A dataset is made by a function or class called with (indexed, documents, num_samples) and the keywords of `_Maker.make`. Its attribute
# `splits_documents` says that `documents` counts documents (BERT, T5) and not sequences (GPT). Without a corpus the first two are None.
DATASETS = Registry(
    "dataset",
    {
        "gpt": "megalith.data.samples.gpt_dataset:from_config",
        "bert": "megalith.data.samples.bert_dataset:from_config",
        "t5": "megalith.data.samples.t5_dataset:from_config",
        "ict": "megalith.data.samples.ict_dataset:from_config",
    },
)
THREADS = 16
INDEX_BYTES = (
    24  # of a sample: its place in the corpus, in the shuffled order, in a blend; and what building these takes
)


def build_datasets(
    config: RunConfig, tokenizer: Any, *, rank: int = 0, size: int = 1, run_folder: str | os.PathLike | None = None
) -> dict[str, Any]:
    """{"train": dataset or None, "valid": ..., "test": ...} of samples as `config.data.dataset` makes them.

    tokenizer: as megalith.data.tokenizers.tokenizer makes them (vocab_size, eod, ...). rank, size: data-parallel rank, which decides what this
    process builds first, and number of ranks. run_folder: another place for index files, where the data's own folder is read-only.
    Raises ConfigError or DataError naming the flag or file; corpora are opened, checked and indexed before this returns.
    """
    maker, data = _Maker(config, tokenizer, run_folder), config.data
    sizes = dict(zip(NAMES, sample_counts(config, size)))
    check_memory(config, sizes)
    own = {name: list(getattr(data, f"{name}_data_path")) for name in NAMES}
    if not any(own.values()):
        keep_unused = data.data_weights_schedule is not None  # a weight of 0 may be raised during the run
        listed = data.data_file_list
        sources = read_list(listed, keep_unused) if listed else sources_of(data.data_path, keep_unused=keep_unused)
        opened = maker.open(sources)
        built = {
            name: maker.split(sources, opened, sizes[name], number, name == "train")
            for number, name in enumerate(NAMES)
        }
    else:
        built = {}
        for name in NAMES:
            keep_unused = name == "train" and data.data_weights_schedule is not None
            sources = sources_of(own[name], f"--{name}-data-path", keep_unused)
            built[name] = (
                maker.split(sources, maker.open(sources), sizes[name], None, name == "train") if sources else None
            )
    maker.prepare_all(rank)
    return built


def sample_counts(config: RunConfig, size: int = 1) -> tuple[int, int, int]:
    """Samples of training, validation and test that the run asks for (Megatron's numbers; `size` data-parallel ranks)."""
    batch, schedule, validation = global_batch(config, size), config.schedule, config.validation
    train = schedule.train_samples if schedule.train_samples is not None else (schedule.train_iters or 0) * batch
    rounds = train // batch // validation.eval_interval + 1
    return train, rounds * validation.eval_iters * batch, validation.eval_iters * batch


def check_memory(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError where indices of so many samples of a split are larger than the memory that is free."""
    free = available_memory()
    for name, count in sizes.items():
        if count * INDEX_BYTES > free:
            rule = (
                f"their index takes about {units.size(count * INDEX_BYTES)}, and {units.size(free)} of memory are free"
            )
            flag = "the length of the run" if name == "train" else f"--eval-iters, {config.validation.eval_iters}"
            more = ", or raise --eval-interval" * (name == "valid")
            raise ConfigError(problem(f"samples for {name}", count, rule, f"Lower {flag}{more}"))


def report(dataset: Any) -> list[dict[str, Any]]:
    """A row per source of a built dataset: prefix, corpus, weight (None where there was none), samples taken, and epochs that they make."""
    return [row.described() for row in getattr(dataset, "rows", ())]


def told(dataset: Any, most: int = 20) -> list[str]:
    """Lines with samples and epochs of each source of a blend, or each corpus where sources have one, largest first; [] for one alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report(dataset):
        groups.setdefault(row["corpus"] or row["prefix"], []).append(row)
    taken = {name: sum(row["samples"] for row in rows) for name, rows in groups.items()}
    lines = []
    for name in sorted(groups, key=lambda name: -taken[name]):
        there = sum(row["tokens"] for row in groups[name])
        epochs = sum(row["tokens"] / there * row["epochs"] for row in groups[name])
        lines.append(f"{name}: {taken[name]} samples, {epochs:.3g} epochs")
    return [] if len(lines) < 2 else lines[:most] + [f"and {len(lines) - most} more"] * (len(lines) > most)


def without_validation(data: DataConfig, train: Any) -> str:
    """Why there is no validation data beside these training data, and the cure."""
    none = "no validation data, so nothing is validated"
    if data.train_data_path:
        return f"{none}: --valid-data-path names some"
    apart = "name other data by --train-data-path and --valid-data-path instead of --data-path"
    if not shares(data.split)[1]:
        return f"{none}: --split {data.split!r} has no share for it. Give it a second number, or {apart}."
    counts = [row.documents for row in getattr(train, "rows", ())]
    if not counts:
        return f"{none}: --split or --valid-data-path gives some"
    there = f"{sum(counts)} document{'s' * (sum(counts) > 1)}" + f" in {len(counts)} datasets" * (len(counts) > 1)
    cure = f"Raise its second number, or {apart}"
    if max(counts) == 1:
        why = "a plain-text file is one document, whatever its size. "
        cure = f"{why}Give `megalith data preprocess` JSON lines, a document a line, or {apart}"
    return f"{none}: of {there} --split {data.split!r} leaves none for it. {cure[0].upper()}{cure[1:]}."


@dataclasses.dataclass
class Row:
    """One source as one split uses it."""

    source: Source
    tokens: int  # of the split's documents
    seq_length: int
    documents: int  # of the source, whatever the split takes of them
    samples: int = 0

    def described(self) -> dict[str, Any]:
        """The row as plain values."""
        values = {
            "prefix": self.source.prefix,
            "corpus": self.source.corpus,
            "weight": self.source.weight,
            "samples": self.samples,
        }
        return {**values, "tokens": self.tokens, "epochs": self.samples * self.seq_length / max(1, self.tokens)}


class _Maker:
    """What the datasets of one run share."""

    def __init__(self, config: RunConfig, tokenizer: Any, run_folder: str | os.PathLike | None):
        self.config, self.tokenizer, self.run_folder = config, tokenizer, run_folder
        self.kind = DATASETS.find(config.data.dataset)
        self.by_document = getattr(self.kind, "splits_documents", False)
        if config.data.seq_length is None:
            raise ConfigError(problem("--seq-length", None, "samples have a length", "Add --seq-length N"))
        self.seq_length = config.data.seq_length
        self.made: list[Any] = []
        self.places: dict[str, list[pathlib.Path]] = {}

    def open(self, sources: Sequence[Source]) -> list[Any]:
        """Open and check every source, in parallel."""
        spots, data = max(2, 1024 // max(1, len(sources))), self.config.data
        reader = "mmap" if data.mmap_bin_files else "pread"

        def look(source: Source) -> Any:
            return check_source(open_indexed(source.prefix, reader), self.tokenizer, data, not self.by_document, spots)

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            opened = list(pool.map(look, sources))
        check_some_tokens(sources, opened)
        return opened

    def make(self, indexed: Any, documents: tuple[int, int] | None, num_samples: int | None, turn: int = 0) -> Any:
        """One dataset; `turn` above 0 shuffles anew."""
        folders = self._folders(indexed) if indexed is not None else []
        seed = (self.config.batch.seed + turn) % 2**32
        dataset = self.kind(
            indexed,
            documents,
            num_samples,
            config=self.config,
            tokenizer=self.tokenizer,
            seed=seed,
            cache_folders=folders,
        )
        if turn == 0:
            self.made.append(dataset)
        return dataset

    def _folders(self, indexed: Any) -> list[pathlib.Path]:
        beside = os.path.dirname(indexed.prefix)
        if beside not in self.places:  # asked for every source, and paths are slow to put together
            self.places[beside] = default_folders(indexed.prefix, self.config.data.data_cache_path, self.run_folder)
        return self.places[beside]

    def prepare_all(self, rank: int) -> None:
        """Build every index, each rank starting elsewhere, so that ranks that share a cache share the work."""
        turned = self.made[rank % max(1, len(self.made)) :] + self.made[: rank % max(1, len(self.made))]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(prepare, turned))

    def split(
        self, sources: Sequence[Source], opened: Sequence[Any], size: int, number: int | None, training: bool
    ) -> Any:
        """The dataset of one split: its `number` among NAMES, or None for whole files. None where it has no samples or documents.

        training: whether --data-weights-schedule, whose sample numbers are those of training, is for it.
        """
        if size == 0:
            return None
        if not sources:
            return self.make(None, None, size)
        parts = []
        without: list[str] = []
        for source, indexed in zip(sources, opened):
            count = indexed.num_documents if self.by_document else len(indexed)
            bounds = (
                (0, count)
                if number is None
                else split_bounds(self.config.data.split, count, self.config.data.split_rounding)[number]
            )
            edges = [int(indexed.document_indices[bound]) for bound in bounds] if self.by_document else bounds
            tokens = indexed.tokens_between(*edges)
            if tokens and (training or source.weight != 0):
                parts.append((source, indexed, bounds, tokens))
            elif source.weight != 0:
                weight = "" if source.weight is None else f", weight {source.weight:g}"
                without.append(f"{source.prefix} ({count} documents{weight})")
        if not parts:
            return None
        if without and number is not None:
            lost = f"leaves no document of {', '.join(without)} for {NAMES[number]}"
            weighted = parts[0][0].weight is not None
            rest = "there their weight goes to the others" if weighted else "it reads the others alone"
            warnings.warn(f"--split {self.config.data.split!r} {lost}; {rest}", stacklevel=2)
        rows = [Row(source, tokens, self.seq_length, indexed.num_documents) for source, indexed, _, tokens in parts]
        dataset = (
            self._single(parts, size)
            if len(parts) == 1 and sources[0].weight is None
            else self._blend(parts, rows, size, sources if training else ())
        )
        if len(rows) == 1:
            rows[0].samples = size
        with contextlib.suppress(AttributeError):  # a user's dataset may be a plain list
            dataset.rows = rows
        return dataset

    def _single(self, parts: list, size: int) -> Any:
        _, indexed, bounds, _ = parts[0]
        return self.make(indexed, bounds, size)

    def _blend(self, parts: list, rows: list[Row], size: int, scheduled: Sequence[Source]) -> Any:
        weights, requests = self._requests(parts, size)
        datasets = [self._endless(indexed, bounds, asked) for (_, indexed, bounds, _), asked in zip(parts, requests)]
        folders = self._folders(parts[0][1])
        names = list(dict.fromkeys(row.source.corpus for row in rows))
        schedule = self._schedule(scheduled, rows) if scheduled else []
        if names == [""]:
            blended = Blended(datasets, [(0, weights), *schedule], size, folders)
            for row, taken in zip(rows, blended.taken):
                row.samples = int(taken)
            return blended
        members = [[place for place, row in enumerate(rows) if row.source.corpus == name] for name in names]
        shuffle = self.config.batch.seed if self.config.data.shuffle_sample_in_corpus else None
        corpora = [
            Corpus(
                [datasets[place] for place in group],
                [requests[place] for place in group],  # type: ignore[misc]
                blend=self.config.data.blend_sample_in_corpus,
                shuffle_seed=shuffle,
            )
            for group in members
        ]
        weights = [
            len(corpus) if any(rows[place].source.weight for place in group) else 0
            for group, corpus in zip(members, corpora)
        ]
        blended = Blended(corpora, [(0, weights), *schedule], size, folders)
        for group, corpus, taken in zip(members, corpora, blended.taken):
            for place in group:
                rows[place].samples = round(int(taken) * requests[place] / len(corpus))  # type: ignore[operator]
        return blended

    def _endless(self, indexed: Any, bounds: tuple[int, int], asked: int | None) -> Endless:
        return Endless(lambda turn: self.make(indexed, bounds, asked, turn))

    def _requests(self, parts: list, size: int) -> tuple[list[float], list[int | None]]:
        """Weights, and samples to ask of each part. Without weights each part gives in proportion to the samples of one epoch."""
        weights = [source.weight for source, _, _, _ in parts]
        if weights[0] is None:
            weights = [(tokens - 1) // self.seq_length for _, _, _, tokens in parts]
            if not self.by_document and 0 not in weights and size <= sum(weights):
                return weights, [None] * len(parts)  # Megatron builds one epoch of each
            weights = [tokens for _, _, _, tokens in parts]
        rounding = self.config.data.split_rounding
        return weights, [max(1, request(size, share, rounding)) for share in normalised(weights).tolist()]

    def _schedule(self, sources: Sequence[Source], rows: Sequence[Row]) -> list[tuple[int, list[float]]]:
        """The changes of --data-weights-schedule: (first sample, weights of what is blended), in rising order.

        A line has a weight for each of `sources`, or for each of their corpora; those without documents here are left out.
        """
        path = self.config.data.data_weights_schedule
        if path is None:
            return []
        names: list[Any] = list(dict.fromkeys(source.corpus for source in sources))
        used: set[Any] = {row.source.corpus for row in rows}
        if names == [""]:
            names, used = [id(source) for source in sources], {id(row.source) for row in rows}
        count, changes = len(names), list[tuple[int, list[float]]]()
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--data-weights-schedule {path} cannot be read: {error}. Correct the path.") from error
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                start, weights = int(line.split()[0]), [float(word) for word in line.split()[1:]]
            except ValueError:
                start, weights = -1, []
            here = [weight for weight, name in zip(weights, names) if name in used]
            right = len(weights) == count and min(weights) >= 0 and 0 < sum(here) < float("inf")
            if start <= (changes[-1][0] if changes else 0) or not right:
                rule = f"a line is a sample number above the last one and {count} weights, none negative, one with documents above 0"
                raise DataError(
                    problem(f"--data-weights-schedule {path}, line {number}", line, rule, "Correct the line")
                )
            changes.append((start, here))
        return changes
