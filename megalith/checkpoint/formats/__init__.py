"""The formats that weights are read from and written to, by name; each is one module with a FORMAT.

weights = read(SOURCE)                    # the format is recognised
FORMATS.find("huggingface").write(weights, FOLDER, HuggingFaceOptions(dtype="bfloat16"))
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from megalith.checkpoint.formats.huggingface import tokenizer
from megalith.checkpoint.formats.options import (
    QKV_LAYOUTS,
    REPLICAS,
    SWIGLU_ORDERS,
    DeepSpeedOptions,
    HuggingFaceOptions,
    MegalithOptions,
    MegatronOptions,
    MegatronReadOptions,
    Options,
    PeftOptions,
    TorchDistOptions,
)
from megalith.checkpoint.store.folder import describe_runs
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem
from megalith.common.pointers import pointers_below
from megalith.common.registry import Registry
from megalith.config.flags.text import Words

__all__ = [
    "FORMATS",
    "QKV_LAYOUTS",
    "REPLICAS",
    "SWIGLU_ORDERS",
    "DeepSpeedOptions",
    "Format",
    "HuggingFaceOptions",
    "MegalithOptions",
    "MegatronOptions",
    "MegatronReadOptions",
    "Options",
    "PeftOptions",
    "TorchDistOptions",
    "read",
    "recognise",
    "refuse_pointers",
    "select_options",
]


class Format(NamedTuple):
    """A format.

    description: its files, for the error that lists all formats. options: the class of the options that `read` and
    `write` take. write: None where the format is only read.
    """

    description: str
    recognises: Callable[[pathlib.Path], bool]
    options: type[Options]
    read: Callable[[pathlib.Path, Any], Weights]
    write: Callable[[Weights, pathlib.Path, Any], None] | None = None


FORMATS = Registry(
    "checkpoint format",
    {
        "megalith": "megalith.checkpoint.formats.megalith:FORMAT",
        "peft": "megalith.checkpoint.formats.peft:FORMAT",
        "huggingface": "megalith.checkpoint.formats.huggingface.conversion:FORMAT",
        "megatron": "megalith.checkpoint.formats.megatron.legacy:FORMAT",
        "deepspeed": "megalith.checkpoint.formats.deepspeed.tree:FORMAT",
        "torch_dist": "megalith.checkpoint.formats.megatron.dist:FORMAT",
    },
)


def recognise(path: str | os.PathLike) -> str:
    """The name of the format that `path` is in. Raises CheckpointError where it is in none, or does not exist."""
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(
            problem("The source", str(path), "must be an existing file or folder", "Correct the path")
        )
    for name in FORMATS:
        if FORMATS.find(name).recognises(path):
            return name
    refuse_pointers(path)
    if runs := describe_runs(path):
        raise CheckpointError(runs)
    inside = sorted(each.name for each in path.iterdir())[:8] if path.is_dir() else Words("a file")
    known = "; ".join(FORMATS.find(name).description for name in FORMATS)
    rule = f"must be in one of the known formats ({known})"
    raise CheckpointError(problem(f"{path}", inside, rule, "Correct the path, or name the format with --from"))


def refuse_pointers(path: pathlib.Path) -> None:
    """Raise CheckpointError that names the files in whose place git LFS left pointers: why reading has failed."""
    if found := pointers_below(path):
        raise CheckpointError("\n".join(found[:8]) + f"\nand {len(found) - 8} more" * (len(found) > 8))


def read(
    path: str | os.PathLike, format: str | None = None, options: Options | Mapping[str, Any] | None = None
) -> Weights:
    """The weights at `path`, in `format` or the one recognised, with adapters where it or an option names them.

    options: of the format's own class; or {name: value} of options of any format, where the caller does not know the
    format: those that this format has no use for are without effect. Raises CheckpointError for options of another
    format's class and for names that no format has.
    """
    with _naming_pointers(pathlib.Path(path)):
        name = format or recognise(path)
    own_options = select_options(name, options or {})
    with _naming_pointers(pathlib.Path(path)):
        weights = FORMATS.find(name).read(pathlib.Path(path), own_options)
    weights = replace(weights, source=os.fspath(path)) if weights.source == Weights.source else weights
    if own_options.adapter is not None:
        from megalith.checkpoint.formats.adapters import attach, read_adapter  # which imports this module

        weights = attach(weights, read_adapter(own_options.adapter, weights))
    if own_options.tokenizer is None:
        return weights
    others = {name: file for name, file in weights.files.items() if not name.startswith(tokenizer.FOLDER)}
    return replace(weights, files=others | tokenizer.tokenizer_files(own_options.tokenizer))


def select_options(name: str, given: Options | Mapping[str, Any], others: Collection[type[Options]] = ()) -> Options:
    """The options of the format called `name` among those given, as `read` takes them.

    others: classes whose names may be among them too, beside those of FORMATS. Raises CheckpointError as `read` does.
    """
    own = FORMATS.find(name).options
    if isinstance(given, Options):
        if not isinstance(given, own):
            rule = f"must be {own.__name__} for the format {name}"
            found = Words(f"a {type(given).__name__}")
            raise CheckpointError(problem("The options", found, rule, "Give options of the source's format"))
        return given
    known = {each.name for options in (own, *others) for each in fields(options)}
    if given.keys() - known:  # only now, because it imports all formats
        known |= {each.name for other in FORMATS for each in fields(FORMATS.find(other).options)}
    if unknown := sorted(given.keys() - known):
        raise CheckpointError(
            problem("The options", unknown, "must be options of a checkpoint format", "Correct the name")
        )
    return own.select(given)


@contextlib.contextmanager
def _naming_pointers(path: pathlib.Path) -> Iterator[None]:
    """Where what is done with `path` fails, an error that names pointers of git LFS below it, if there are any."""
    try:
        yield
    except Exception:
        refuse_pointers(path)
        raise
