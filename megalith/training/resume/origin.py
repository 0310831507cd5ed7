"""A run compared with the checkpoint that it starts from: another model is an error, other data or rates are notes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from megalith import checkpoint
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store.fit import describe_model_difference
from megalith.common.errors import CheckpointError, ConfigError, DataError, problem
from megalith.common.files import sampled_digest
from megalith.config.flags.text import Words
from megalith.config.flags.values import fields
from megalith.config.heads import describe_new_head, with_head
from megalith.config.identity import changes, differences
from megalith.config.run import RunConfig
from megalith.config.sections.data import TOKENIZER_FILES, DataConfig
from megalith.data.build import source_usage
from megalith.data.indexed.format import dataset_files, resolve_prefix
from megalith.data.samples.epochs import Epochs, OneEpoch
from megalith.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalith.training.resume.labels import compare_labels
from megalith.training.resume.source import Source, is_foreign, read_source, source_of, weights_only

# Sections of the config that decide, with the model, what a step reads and computes.
COMPARED_SECTIONS = ("data", "batch", "optimizer", "precision", "lora", "finetuning", "retriever")
# Their fields that do not change that, except for rounding. Tokenizers are compared by their vocabularies instead.
IGNORED_FIELDS = (
    "data_cache_path", "num_workers", "mmap_bin_files", "micro_batch_size", "compile", "deterministic_mode",
    "adapter", "pretrained_checkpoint", "keep_best", "tokenizer_type", *TOKENIZER_FILES, "bert_load",
    "retriever_report_topk_accuracies", "retriever_chunk_queries",
)  # fmt: skip
CORPUS_FIELDS = (
    "data_path", "train_data_path", "valid_data_path", "test_data_path", "data_file_list", "titles_data_path",
)  # fmt: skip
SAMPLED_BLOCKS = 8  # of 4 KiB: how much of a file is read for its fingerprint


def has_exact_gelu(config: RunConfig) -> bool:
    """Whether GELU is the exact one, whatever the config says.

    So it is where the run's checkpoint was stored before --bias-gelu-fusion had an effect.
    """
    source, model = source_of(config), config.model
    if source is None or is_foreign(source) or model.openai_gelu or model.activation != "gelu_tanh":
        return False
    return "bias_gelu_fusion" not in checkpoint.read_config(checkpoint.find(source, config.checkpoint.ckpt_step))


def compare(config: RunConfig, tokenizer: Tokenizer, data: Mapping[str, str]) -> list[str]:
    """Lines that name all in which a run differs from the checkpoint that it starts from, if any.

    Every process calls it. data: fingerprints of the corpora (see `fingerprints`).
    Raises CheckpointError on all processes where the weights would be those of another model.
    """
    source = source_of(config)
    if source is None:
        return []

    def compare_here() -> list[str]:
        try:
            return _compare(read_source(config, source), config, tokenizer, data)
        except ConfigError as error:  # a config of another release
            return [f"the settings it was trained with are not compared, as its config cannot be read here: {error}"]

    return Ranks().on_rank_0(compare_here)


def _compare(source: Source, config: RunConfig, tokenizer: Tokenizer, data: Mapping[str, str]) -> list[str]:
    then = source.config
    new_run = weights_only(config)  # a new run begins with the weights, so its data and rates are its own
    head, labels = describe_new_head(config.model, then.model), list[str]()
    if head and not new_run:
        rule, cure = (
            "must be of a run of this task to resume it",
            f"--pretrained-checkpoint {source.path} begins with it",
        )
        raise CheckpointError(problem(f"--load {source.path}", Words(head), rule, cure))
    if head and config.validation.skip_train:
        rule = f"must be of a {config.model.model_type} with its head to be measured"
        cure = "Name a finetuned model, or train this one first: --epochs 3"
        raise CheckpointError(problem(f"{source.path}", Words(head), rule, cure))
    if head:
        then = dataclasses.replace(then, model=with_head(then.model, config.model))
    if another := describe_model_difference(source.path, config.model, then.model):
        raise CheckpointError(another)
    elif config.model.architecture.head:
        labels = compare_labels(source, config, new_run)
    lines = [head] * bool(head) + labels + differences(config.model, then.model).noted
    lines += _tokenizer_changes(source, tokenizer, new_run)
    if new_run:
        return lines
    paths_now, paths_then = (
        {name: _real_paths(getattr(data_config, name)) for name in CORPUS_FIELDS}
        for data_config in (config.data, then.data)
    )
    same = [name for name in CORPUS_FIELDS if paths_now[name] == paths_then[name]]
    for section in COMPARED_SECTIONS:
        left = (*IGNORED_FIELDS, *same)
        names = tuple(field.name for field in fields().values() if field.section == section and field.name not in left)
        lines += changes(getattr(config, section), getattr(then, section), names)
    before = source.train_state.get("data", data)  # converted checkpoints do not say
    return lines + _data_changes(data, before, same == [*CORPUS_FIELDS])


def _real_path(path: str) -> str:
    """The real path of a dataset or a file, by whatever name it is given."""
    with contextlib.suppress(DataError):
        path = resolve_prefix(path)
    return os.path.realpath(path)


def _real_paths(value: Any) -> list[str]:
    """The real paths that a field names; weights between them become paths too, which differ where the weights do."""
    return [_real_path(item) for item in (value if isinstance(value, list) else [value]) if item is not None]


def _data_changes(now: Mapping[str, str], then: Mapping[str, str], same_flags: bool) -> list[str]:
    """The data that has changed under the same name. same_flags: the flags name the same data as then."""
    names = {_real_path(name): name for name in now}
    before = {_real_path(name): fingerprint for name, fingerprint in then.items()}
    changed = [name for path, name in names.items() if before.get(path, now[name]) != now[name]]
    lines = [f"{name} is not what it was then" for name in changed]
    if same_flags:  # then a list or a folder of corpora may name others
        lines += [f"{name} is read now, and was not then" for path, name in names.items() if path not in before]
        lines += [f"{name} is not read now, and was then" for name in then if _real_path(name) not in names]
    if lines:
        lines.append("as the data has changed, samples that were read may come again and others never")
    return lines


def _tokenizer_changes(source: Source, tokenizer: Tokenizer, new_run: bool) -> list[str]:
    """Lines on a tokenizer that is not the one in the checkpoint; CheckpointError where ids stand for other tokens."""
    folder, kind = source.tokenizer, source.config.data.tokenizer_type
    if folder is None:
        current = tokenizer.options.tokenizer_type
        line = f"the tokenizer is a {current}, and {source.path} was trained with a {kind}"
        return [] if kind in (None, current) else [line]
    try:
        then = load_tokenizer(folder, source.config.data)
        if then.fingerprint() == tokenizer.fingerprint():
            return []
        kinds = [tokenizer.options.tokenizer_type, then.options.tokenizer_type]
        old, new = ([], []) if "NullTokenizer" in kinds else (then.tokens(), tokenizer.tokens())
    except (DataError, ConfigError, AttributeError) as error:  # of a user's class, or of a package not installed here
        return [f"the tokenizer cannot be compared with the one in {folder}: {error}"]
    differing = [number for number, (one, other) in enumerate(zip(old, new)) if one != other]
    named = f"the tokenizer ({_tokenizer_label(tokenizer)}) is not the one in {folder} ({_tokenizer_label(then)})"
    if not differing:
        if old == new and old:  # as where a chat template ends turns with another token than texts ended with
            return [f"the tokenizer has the tokens of the one in {folder}, and differs in its rules or special tokens"]
        return [f"{named}; they have {tokenizer.vocab_size} and {then.vocab_size} tokens"]
    number = differing[0]
    named += f": {len(differing)} ids are other tokens, first {number}: {new[number]!r}, was {old[number]!r}"
    if new_run:
        return [named]
    raise CheckpointError(
        f"{named}. The model would read other tokens than it has learned. Give the tokenizer that it was trained with, "
        f"or begin a new run with its weights: --load {source.path} --finetune --run-dir NEW."
    )


def _tokenizer_label(tokenizer: Tokenizer) -> str:
    files = [str(path) for path in tokenizer.files().values()]
    return " ".join([tokenizer.options.tokenizer_type, *files])


def fingerprints(datasets: Iterable[Any], config: DataConfig) -> dict[str, str]:
    """{prefix or file: a hash} of the corpora that these datasets read, and of the files that give their weights.

    It costs a few small reads for each.
    """
    datasets = list(datasets)
    named = {row["prefix"]: None for dataset in datasets for row in source_usage(dataset)}
    found = {str(prefix): _fingerprint(str(prefix)) for prefix in [*named, *filter(None, [config.titles_data_path])]}
    files = [file for dataset in task_datasets(datasets) for file in getattr(dataset, "files", ())]
    found |= {file: sampled_digest(pathlib.Path(file), SAMPLED_BLOCKS) for file in files}
    lists = [path for path in (config.data_file_list, config.data_weights_schedule) if path]
    return found | {path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for path in lists}


def validation_fingerprint(valid: Any, data: Mapping[str, str]) -> str | None:
    """A hash of validation data that come by name, {name: OneEpoch}; None of others. data: see `fingerprints`."""
    if not isinstance(valid, Mapping):
        return None
    named = [[name, *(data[file] for file in getattr(each.dataset, "files", ()))] for name, each in valid.items()]
    return hashlib.sha256(json.dumps(sorted(named)).encode()).hexdigest()[:16]


def task_datasets(datasets: Iterable[Any]) -> list[Any]:
    """The datasets of a task's files among those of data/build.py, without what counts their epochs."""
    each = [part for found in datasets for part in (found.values() if isinstance(found, Mapping) else [found])]
    return [part.dataset for part in each if isinstance(part, (Epochs, OneEpoch))]


def _fingerprint(prefix: str) -> str:
    with contextlib.suppress(DataError):
        prefix = resolve_prefix(prefix)
    found = []
    for file in dataset_files([prefix]):
        with contextlib.suppress(OSError):  # the prefix of a user's own dataset may not be a file
            found.append(sampled_digest(file, SAMPLED_BLOCKS))
    return " ".join(found)
