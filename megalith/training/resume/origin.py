"""What a run starts from, compared with what it is: another model is an error, other data or rates are told."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from megalith import checkpoint
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store.fit import another_model
from megalith.common.errors import CheckpointError, ConfigError, DataError
from megalith.common.files import sampled_digest
from megalith.config.flags.values import fields
from megalith.config.identity import changes, differences
from megalith.config.run import RunConfig
from megalith.config.sections.data import TOKENIZER_FILES, DataConfig
from megalith.data.build import report
from megalith.data.indexed.format import dataset_files, resolve_prefix
from megalith.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalith.training.resume.source import Source, is_foreign, look, source_of, weights_only

COMPUTING = (
    "data",
    "batch",
    "optimizer",
    "precision",
)  # sections that decide, with the model, what a step reads and computes
INDIFFERENT = (  # of which these do not, but for rounding; what a tokenizer is made from, its vocabulary tells better
    "data_cache_path", "num_workers", "mmap_bin_files", "micro_batch_size", "compile", "deterministic_mode",
    "tokenizer_type", *TOKENIZER_FILES,
)  # fmt: skip
CORPORA = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_file_list", "titles_data_path")
BLOCKS = 8  # of 4 KiB, that are looked at in a file


def has_exact_gelu(config: RunConfig) -> bool:
    """Whether GELU is the exact one, whatever the config says: what it starts from was stored before --bias-gelu-fusion had an effect."""
    source, model = source_of(config), config.model
    if source is None or is_foreign(source) or model.openai_gelu or model.activation != "gelu_tanh":
        return False
    return "bias_gelu_fusion" not in checkpoint.read_config(checkpoint.find(source, config.checkpoint.ckpt_step))


def compare(config: RunConfig, tokenizer: Tokenizer, data: Mapping[str, str]) -> list[str]:
    """Lines that name all in which a run differs from the checkpoint that it starts from, if any. Every process calls it.

    data: fingerprints of the corpora (see `fingerprints`).
    Raises CheckpointError on all processes where the weights would be those of another model.
    """
    source = source_of(config)
    if source is None:
        return []

    def judge() -> list[str]:
        try:
            return _compare(look(config, source), config, tokenizer, data)
        except ConfigError as error:  # a config of another release
            return [f"what it was trained with is not compared, because its config cannot be read here: {error}"]

    return Ranks().first(judge)


def _compare(source: Source, config: RunConfig, tokenizer: Tokenizer, data: Mapping[str, str]) -> list[str]:
    then = source.config
    alone = weights_only(config)  # a new run begins with the weights, so its data and rates are its own
    if another := another_model(source.path, config.model, then.model):
        raise CheckpointError(another)
    lines = differences(config.model, then.model).noted + _words(source, tokenizer, alone)
    if alone:
        return lines
    alike = [name for name in CORPORA if _places(getattr(config.data, name)) == _places(getattr(then.data, name))]
    for section in COMPUTING:
        left = (*INDIFFERENT, *alike)
        names = tuple(field.name for field in fields().values() if field.section == section and field.name not in left)
        lines += changes(getattr(config, section), getattr(then, section), names)
    before = source.train_state.get("data", data)  # converted checkpoints do not say
    return lines + _replaced(data, before, alike == [*CORPORA])


def _place(path: str) -> str:
    """Where a dataset or a file is, whatever it is called by."""
    with contextlib.suppress(DataError):
        path = resolve_prefix(path)
    return os.path.realpath(path)


def _places(value: Any) -> list[str]:
    """Those that a field names; a weight between them is kept apart from all others too."""
    return [_place(word) for word in (value if isinstance(value, list) else [value]) if word is not None]


def _replaced(now: Mapping[str, str], then: Mapping[str, str], named_alike: bool) -> list[str]:
    """What of the data is other than it was under the same name. named_alike: the flags name the same data as then."""
    here, before = {_place(name): name for name in now}, {_place(name): each for name, each in then.items()}
    changed = [name for place, name in here.items() if before.get(place, now[name]) != now[name]]
    lines = [f"{name} is not what it was then" for name in changed]
    if named_alike:  # what a list or a folder of corpora names
        lines += [f"{name} is read, was not" for place, name in here.items() if place not in before]
        lines += [f"{name} is not read, was" for name in then if _place(name) not in here]
    if lines:
        lines.append("as the data is another, samples that were read may come again and others never")
    return lines


def _words(source: Source, tokenizer: Tokenizer, weights_only: bool) -> list[str]:
    """What to tell of a tokenizer that is not the one in the checkpoint; CheckpointError where it gives ids to other words."""
    folder, kind = source.tokenizer, source.config.data.tokenizer_type
    if folder is None:
        mine = tokenizer.options.tokenizer_type
        line = f"the tokenizer is a {mine}, and {source.path} was trained with a {kind}"
        return [] if kind in (None, mine) else [line]
    try:
        then = load_tokenizer(folder, source.config.data)
        if then.fingerprint() == tokenizer.fingerprint():
            return []
        kinds = [each.options.tokenizer_type for each in (tokenizer, then)]
        old, new = ([], []) if "NullTokenizer" in kinds else (then.tokens(), tokenizer.tokens())
    except (DataError, ConfigError, AttributeError) as error:  # of a user's own class, or of a package that is not here
        return [f"the tokenizer cannot be compared with the one in {folder}: {error}"]
    differing = [number for number, (one, other) in enumerate(zip(old, new)) if one != other]
    named = f"the tokenizer ({_called(tokenizer)}) is not the one in {folder} ({_called(then)})"
    if not differing:
        both = "" if old == new and old else f"; they have {tokenizer.vocab_size} and {then.vocab_size} tokens"
        return [f"{named}{both}"]
    number = differing[0]
    named += f": {len(differing)} ids are other words, first {number}: {new[number]!r}, was {old[number]!r}"
    if weights_only:
        return [named]
    raise CheckpointError(
        f"{named}. The model would read other words than it has learned. Give the tokenizer that it was trained with, or begin a new "
        f"run with its weights: --load {source.path} --finetune --run-dir NEW."
    )


def _called(tokenizer: Tokenizer) -> str:
    files = [str(path) for path in tokenizer.files().values()]
    return " ".join([tokenizer.options.tokenizer_type, *files])


def fingerprints(datasets: Iterable[Any], config: DataConfig) -> dict[str, str]:
    """{prefix or file: a hash} of the corpora that these datasets read, and of what says in what shares; a few small reads for each."""
    named = {row["prefix"]: None for dataset in datasets for row in report(dataset)}
    found = {str(prefix): _fingerprint(str(prefix)) for prefix in [*named, *filter(None, [config.titles_data_path])]}
    lists = [path for path in (config.data_file_list, config.data_weights_schedule) if path]
    return found | {path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for path in lists}


def _fingerprint(prefix: str) -> str:
    with contextlib.suppress(DataError):
        prefix = resolve_prefix(prefix)
    found = []
    for file in dataset_files([prefix]):
        with contextlib.suppress(OSError):  # a user's own dataset may call by a prefix what is no file
            found.append(sampled_digest(file, BLOCKS))
    return " ".join(found)
