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
from megalith.config.finetuning import in_samples
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.config.sections.data import DataConfig, split_fractions
from megalith.data.indexed.tntidx import open_indexed
from megalith.data.samples.blend import normalize, requested_samples
from megalith.data.samples.blended import BlendedDataset, CorpusDataset, EndlessDataset, prepare
from megalith.data.samples.epochs import Epochs, OneEpoch
from megalith.data.samples.index_cache import default_folders
from megalith.data.samples.splits import SPLIT_NAMES, split_bounds
from megalith.data.source_checks import check_not_empty, check_source
from megalith.data.sources import Source, split_sources

# A dataset is made by a function or class called with (indexed, documents, num_samples) and the keywords of
# `_DatasetBuilder.build`. Its attribute `splits_documents`, if any, says that `documents` counts documents (BERT, T5)
# and not sequences (GPT). Without a corpus the first two are None. Its attribute `finish`, if any, is called once with
# (config, tokenizer, datasets, samples requested), both {split: ...}, and returns the datasets that are read.
# A dataset of the files of a task has the attribute `open_files` instead, a function (config, tokenizer) -> (training
# dataset or None, {name: validation dataset}) whose datasets have a length, are read whole, and have a `loss_mask` in
# each sample; see samples/epochs.py. Such a factory may have `prepare_tokenizer`, see below.
DATASETS = Registry(
    "dataset",
    {
        "gpt": "megalith.data.samples.gpt_dataset:from_config",
        "bert": "megalith.data.samples.bert_dataset:from_config",
        "t5": "megalith.data.samples.t5_dataset:from_config",
        "retro": "megalith.data.samples.retro_dataset:from_config",
        "ict": "megalith.data.samples.ict_dataset:from_config",
        "classification": "megalith.data.tasks.dataset:from_files",
        "nq": "megalith.data.samples.nq_dataset:from_files",
        "chat": "megalith.data.instructions.factory:chat",
        "completion": "megalith.data.instructions.factory:completion",
    },
)
THREADS = 16
# of a sample: where it is in the corpus, in the shuffled order and in a blend, and what building these takes
INDEX_BYTES = 24


def build_datasets(
    config: RunConfig, tokenizer: Any, *, rank: int = 0, size: int = 1, run_folder: str | os.PathLike | None = None
) -> dict[str, Any]:
    """{"train": dataset or None, "valid": ..., "test": ...} of samples as `config.data.dataset` makes them.

    tokenizer: as megalith.data.tokenizers.tokenizer makes them (vocab_size, eod, ...). rank, size: data-parallel rank,
    which decides what this process builds first, and number of ranks. run_folder: another folder for index files, used
    where the data's own is read-only. Raises ConfigError or DataError naming the flag or file; corpora are opened,
    checked and indexed before this returns. Of the files of a task, "train" is an Epochs and "valid" {name: OneEpoch}.
    """
    if (open_files := getattr(DATASETS.find(config.data.dataset), "open_files", None)) is not None:
        train, valid = open_files(config, tokenizer)
        return task_datasets(config, train, valid, global_batch(config, size))
    builder, data = _DatasetBuilder(config, tokenizer, run_folder), config.data
    sizes = dict(zip(SPLIT_NAMES, sample_counts(config, size)))
    check_memory(config, sizes)
    sources, divided = split_sources(data)
    opened = builder.open(sources["train"]) if divided else None
    built = {}
    for number, (name, given) in enumerate(sources.items()):
        if divided or given:
            here = opened if divided else builder.open(given)
            built[name] = builder.split(given, here, sizes[name], number if divided else None, name == "train")
        else:
            built[name] = None
    builder.prepare_all(rank)
    finish = getattr(builder.factory, "finish", None)
    return built if finish is None else finish(config, tokenizer, built, sizes)


def task_datasets(config: RunConfig, train: Any, valid: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """What `build_datasets` returns, of the datasets of a task's files. batch: the global batch."""
    epochs, whole = None, {name: OneEpoch(dataset, batch) for name, dataset in valid.items()}
    if train is not None and not config.validation.skip_train:
        if config.finetuning.epochs is not None:
            config = in_samples(config, len(train), batch)
        total = config.schedule.train_samples or (config.schedule.train_iters or 0) * batch
        # Padding for the last batch, wherever batches begin: a run may be resumed with another one.
        epochs = Epochs(train, total, seed=config.batch.seed, padding=batch - 1)
    return {"train": epochs, "valid": whole or None, "test": None}


def prepare_tokenizer(config: RunConfig, tokenizer: Any) -> list[str]:
    """Change the tokenizer where the dataset asks for it; lines on what has changed.

    Chats bring their template, and the token that ends a turn. Raises ConfigError or DataError where they cannot.
    """
    prepare = getattr(DATASETS.find(config.data.dataset), "prepare_tokenizer", None)
    return prepare(config, tokenizer) if prepare else []


def sample_counts(config: RunConfig, size: int = 1) -> tuple[int, int, int]:
    """Samples of training, validation and test that the run requests, as Megatron's. size: data-parallel ranks."""
    batch, schedule, validation = global_batch(config, size), config.schedule, config.validation
    train = schedule.train_samples if schedule.train_samples is not None else (schedule.train_iters or 0) * batch
    rounds = train // batch // validation.interval + 1
    return train, rounds * validation.eval_iters * batch, validation.eval_iters * batch


def check_memory(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError where indices of so many samples of a split are larger than the memory that is free."""
    free = available_memory()
    for name, count in sizes.items():
        if count * INDEX_BYTES > free:
            needed = units.size(count * INDEX_BYTES)
            rule = f"need an index of about {needed}, and {units.size(free)} of memory are free"
            flag = "the length of the run" if name == "train" else f"--eval-iters, {config.validation.eval_iters}"
            more = ", or raise --eval-interval" * (name == "valid")
            raise ConfigError(problem(f"Samples for {name}", count, rule, f"Lower {flag}{more}"))


def source_usage(dataset: Any) -> list[dict[str, Any]]:
    """A dict for each source of a built dataset.

    Its prefix, corpus, weight (None where there was none), samples taken, tokens of one epoch, and epochs taken.
    """
    return [usage.as_dict() for usage in getattr(dataset, "source_usage", ())]


def blend_summary(dataset: Any, max_lines: int = 20) -> list[str]:
    """Lines with samples and epochs of each source of a blend, or each corpus where sources have one, largest first.

    Empty for one source alone.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in source_usage(dataset):
        groups.setdefault(row["corpus"] or row["prefix"], []).append(row)
    taken = {name: sum(row["samples"] for row in rows) for name, rows in groups.items()}
    lines = []
    for name in sorted(groups, key=lambda name: -taken[name]):
        tokens = sum(row["tokens"] for row in groups[name])
        epochs = sum(row["tokens"] / tokens * row["epochs"] for row in groups[name])
        lines.append(f"{name}: {taken[name]} samples, {epochs:.3g} epochs")
    omitted = max(0, len(lines) - max_lines)
    return [] if len(lines) < 2 else lines[:max_lines] + [f"and {omitted} more"] * (omitted > 0)


def why_no_validation(data: DataConfig, train: Any) -> str:
    """Why there is no validation data beside these training data, and the cure."""
    none = "no validation data, so nothing is validated"
    if isinstance(train, Epochs):
        return f"{none}; name some with --valid-data"
    if data.train_data_path:
        return f"{none}; name some with --valid-data-path"
    otherwise = "name other data with --train-data-path and --valid-data-path instead of --data-path"
    if not split_fractions(data.split)[1]:
        return f"{none}: --split {data.split!r} has no second number above 0. Add one, or {otherwise}."
    counts = [usage.documents for usage in getattr(train, "source_usage", ())]
    if not counts:
        return f"{none}; --split or --valid-data-path gives some"
    found = f"{sum(counts)} document{'s' * (sum(counts) > 1)}" + f" in {len(counts)} datasets" * (len(counts) > 1)
    cure = f"Raise its second number, or {otherwise}"
    if max(counts) == 1:
        why = "A plain-text file is one document, whatever its size. "
        cure = f"{why}Give `megalith data preprocess` JSON lines, a document a line, or {otherwise}"
    return f"{none}: of {found} --split {data.split!r} leaves none for it. {cure}."


@dataclasses.dataclass
class SourceUsage:
    """One source as one split uses it."""

    source: Source
    tokens: int  # of the split's documents
    seq_length: int
    documents: int  # of the source, whatever the split takes of them
    samples: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The values that `source_usage` returns."""
        values = {
            "prefix": self.source.prefix,
            "corpus": self.source.corpus,
            "weight": self.source.weight,
            "samples": self.samples,
        }
        return {**values, "tokens": self.tokens, "epochs": self.samples * self.seq_length / max(1, self.tokens)}


class _DatasetBuilder:
    """Builds the datasets of one run, which have config, tokenizer and cache folders in common."""

    def __init__(self, config: RunConfig, tokenizer: Any, run_folder: str | os.PathLike | None):
        self.config, self.tokenizer, self.run_folder = config, tokenizer, run_folder
        self.factory = DATASETS.find(config.data.dataset)
        self.splits_documents = getattr(self.factory, "splits_documents", False)
        if config.data.seq_length is None:
            raise ConfigError(problem("--seq-length", Words("nothing"), "must be given", "Add --seq-length N"))
        self.seq_length = config.data.seq_length
        self.datasets: list[Any] = []
        self.cache_folders: dict[str, list[pathlib.Path]] = {}

    def open(self, sources: Sequence[Source]) -> list[Any]:
        """Open and check every source, in parallel."""
        probes, data = max(2, 1024 // max(1, len(sources))), self.config.data
        reader = "mmap" if data.mmap_bin_files else "pread"

        def open_and_check(source: Source) -> Any:
            indexed = open_indexed(source.prefix, reader)
            return check_source(indexed, self.tokenizer, data, not self.splits_documents, probes)

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            opened = list(pool.map(open_and_check, sources))
        check_not_empty(sources, opened)
        return opened

    def build(
        self, indexed: Any, documents: tuple[int, int] | None, num_samples: int | None, repetition: int = 0
    ) -> Any:
        """One dataset; a `repetition` above 0 is shuffled anew."""
        folders = self._folders(indexed) if indexed is not None else []
        seed = (self.config.batch.seed + repetition) % 2**32
        dataset = self.factory(
            indexed, documents, num_samples, config=self.config, tokenizer=self.tokenizer, seed=seed,
            cache_folders=folders,
        )  # fmt: skip
        if repetition == 0:
            self.datasets.append(dataset)
        return dataset

    def _folders(self, indexed: Any) -> list[pathlib.Path]:
        parent = os.path.dirname(indexed.prefix)
        if parent not in self.cache_folders:  # kept, because there may be many sources and making paths is slow
            chosen = self.config.data.data_cache_path
            self.cache_folders[parent] = default_folders(indexed.prefix, chosen, self.run_folder)
        return self.cache_folders[parent]

    def prepare_all(self, rank: int) -> None:
        """Build every index, each rank starting at another one, so that ranks with one cache divide the work."""
        first = rank % max(1, len(self.datasets))
        rotated = self.datasets[first:] + self.datasets[:first]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(prepare, rotated))

    def split(
        self, sources: Sequence[Source], opened: Sequence[Any], size: int, number: int | None, training: bool
    ) -> Any:
        """The dataset of one split; None where it has no samples or documents.

        number: of the split among SPLIT_NAMES, or None for whole files. training: whether --data-weights-schedule,
        whose sample numbers are those of training, applies to it.
        """
        if size == 0:
            return None
        if not sources:
            return self.build(None, None, size)
        parts = []
        without: list[str] = []
        for source, indexed in zip(sources, opened):
            count = indexed.num_documents if self.splits_documents else len(indexed)
            bounds = (0, count)
            if number is not None:
                bounds = split_bounds(self.config.data.split, count, self.config.data.split_rounding)[number]
            edges = [int(indexed.document_indices[bound]) for bound in bounds] if self.splits_documents else bounds
            tokens = indexed.tokens_between(*edges)
            if tokens and (training or source.weight != 0):
                parts.append((source, indexed, bounds, tokens))
            elif source.weight != 0:
                weight = "" if source.weight is None else f", weight {source.weight:g}"
                without.append(f"{source.prefix} ({count} documents{weight})")
        if not parts:
            return None
        if without and number is not None:
            lost = f"leaves no document of {', '.join(without)} for {SPLIT_NAMES[number]}"
            weighted = parts[0][0].weight is not None
            rest = "there their weight goes to the others" if weighted else "it reads the others alone"
            warnings.warn(f"--split {self.config.data.split!r} {lost}; {rest}", stacklevel=2)
        usages = [
            SourceUsage(source, tokens, self.seq_length, indexed.num_documents) for source, indexed, _, tokens in parts
        ]
        if len(parts) == 1 and sources[0].weight is None:
            dataset = self._single(parts, size)
        else:
            dataset = self._blend(parts, usages, size, sources if training else ())
        if len(usages) == 1:
            usages[0].samples = size
        with contextlib.suppress(AttributeError):  # a user's dataset may be a list
            dataset.source_usage = usages
        return dataset

    def _single(self, parts: list, size: int) -> Any:
        _, indexed, bounds, _ = parts[0]
        return self.build(indexed, bounds, size)

    def _blend(self, parts: list, usages: list[SourceUsage], size: int, scheduled: Sequence[Source]) -> Any:
        weights, requests = self._requests(parts, size)
        datasets = [
            self._endless(indexed, bounds, num_samples) for (_, indexed, bounds, _), num_samples in zip(parts, requests)
        ]
        folders = self._folders(parts[0][1])
        names = list(dict.fromkeys(usage.source.corpus for usage in usages))
        schedule = self._schedule(scheduled, usages) if scheduled else []
        if names == [""]:
            blended = BlendedDataset(datasets, [(0, weights), *schedule], size, folders)
            for usage, taken in zip(usages, blended.samples_per_dataset):
                usage.samples = int(taken)
            return blended
        members = [[index for index, usage in enumerate(usages) if usage.source.corpus == name] for name in names]
        shuffle = self.config.batch.seed if self.config.data.shuffle_sample_in_corpus else None
        corpora = [
            CorpusDataset(
                [datasets[index] for index in group],
                [requests[index] for index in group],  # type: ignore[misc]
                blend=self.config.data.blend_sample_in_corpus,
                shuffle_seed=shuffle,
            )
            for group in members
        ]
        weights = [
            len(corpus) if any(usages[index].source.weight for index in group) else 0
            for group, corpus in zip(members, corpora)
        ]
        blended = BlendedDataset(corpora, [(0, weights), *schedule], size, folders)
        for group, corpus, taken in zip(members, corpora, blended.samples_per_dataset):
            for index in group:
                usages[index].samples = round(int(taken) * requests[index] / len(corpus))  # type: ignore[operator]
        return blended

    def _endless(self, indexed: Any, bounds: tuple[int, int], num_samples: int | None) -> EndlessDataset:
        return EndlessDataset(lambda repetition: self.build(indexed, bounds, num_samples, repetition))

    def _requests(self, parts: list, size: int) -> tuple[list[float], list[int | None]]:
        """Weights, and samples to request of each part.

        Without weights each part gives in proportion to the samples of one epoch.
        """
        weights = [source.weight for source, _, _, _ in parts]
        if weights[0] is None:
            weights = [(tokens - 1) // self.seq_length for _, _, _, tokens in parts]
            if not self.splits_documents and 0 not in weights and size <= sum(weights):
                return weights, [None] * len(parts)  # Megatron builds one epoch of each
            weights = [tokens for _, _, _, tokens in parts]
        rounding = self.config.data.split_rounding
        return weights, [max(1, requested_samples(size, weight, rounding)) for weight in normalize(weights).tolist()]

    def _schedule(self, sources: Sequence[Source], usages: Sequence[SourceUsage]) -> list[tuple[int, list[float]]]:
        """The changes of --data-weights-schedule: (first sample, weights of what is blended), in rising order.

        A line has a weight for each of `sources`, or for each of their corpora; those without documents in the split
        are left out.
        """
        path = self.config.data.data_weights_schedule
        if path is None:
            return []
        names: list[Any] = list(dict.fromkeys(source.corpus for source in sources))
        used: set[Any] = {usage.source.corpus for usage in usages}
        if names == [""]:
            names, used = [id(source) for source in sources], {id(usage.source) for usage in usages}
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
            used_weights = [weight for weight, name in zip(weights, names) if name in used]
            valid = len(weights) == count and min(weights) >= 0 and 0 < sum(used_weights) < float("inf")
            if start <= (changes[-1][0] if changes else 0) or not valid:
                what = f"--data-weights-schedule {path}, line {number},"
                rule = (
                    f"must be a sample number above that of the last line and {count} weights, none negative, and one "
                    f"with documents above 0"
                )
                raise DataError(problem(what, line, rule, "Correct the line"))
            changes.append((start, used_weights))
        return changes
