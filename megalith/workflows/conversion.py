"""Weights from one format to another: read, write, and prove that the result computes what the source computes."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, Options
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface import files as huggingface_files
from megalith.checkpoint.formats.huggingface.family import form
from megalith.checkpoint.store.folder import new_folder
from megalith.checkpoint.tensors.lazy import check_range
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.extras import require
from megalith.data.tokenizers.given import FIELDS, GivenTokenizer
from megalith.runtime.load import check_whole
from megalith.workflows.tokenizer_files import prepared, with_tokenizer

TOLERANCE = 1e-4  # of the largest logit: sums in another order differ by less, a wrong name or layout by 1


def convert(
    source: pathlib.Path,
    folder: pathlib.Path,
    *,
    to: str,
    format: str | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> Weights:
    """Write what is at `source` (in `format`, or the one recognised) into the new `folder` in the format `to`; what was read.

    Tensor by tensor; the folder appears when it is whole. overwrite: also in the place of an earlier conversion.
    Raises CheckpointError where the source is damaged or incomplete, or the target cannot hold it, LockedError while another
    process writes there.
    """
    options = options or Options()
    found = FORMATS.find(to)
    if found.write is None:
        cure = f"Write --to {', '.join(name for name in FORMATS if FORMATS.find(name).write)}"
        raise ConfigError(problem("--to", to, "this format is only read", cure))
    given = GivenTokenizer(options.tokenizer, options.overrides)
    inputs = [source, *([options.tokenizer] if options.tokenizer else [])]
    with (
        new_folder(folder, inputs=inputs, overwrite=overwrite, notice=notice) as place,
        tempfile.TemporaryDirectory() as aside,
    ):
        format = format or formats.recognise(source)
        keeps = to in ("megalith", "huggingface")  # Megatron's directories hold no tokenizer
        weights = formats.read(source, format, dataclasses.replace(options, words=given.words) if keeps else options)
        if format == "megalith":
            said = weights.config.flat()
            check_whole(
                source,
                [name for name, value in options.overrides.items() if name not in FIELDS and said[name] != value],
            )
        if keeps:
            weights, options = with_tokenizer(weights, options, given, pathlib.Path(aside) / "given")
        if options.dtype and to == "megalith":
            weights = cast(weights, getattr(torch, options.dtype))
        notes: tuple[str, ...] = ()
        if to == "huggingface":
            (made := pathlib.Path(aside) / "made").mkdir()
            options, notes = prepared(weights, options, made)
        found.write(weights, place, options)
    return dataclasses.replace(weights, notes=tuple(dict.fromkeys((*weights.notes, *notes))))


def check_reshape(source: pathlib.Path, format: str | None) -> None:
    """Raise ConfigError where `source` is of a format that needs no reshaping, and say what to do instead."""
    found = format or formats.recognise(source)
    if found == "megalith":
        cure = (
            "Give --tensor-model-parallel-size and --pipeline-model-parallel-size to the command that loads it; "
            "for Megatron, write megalith checkpoint export --to megatron"
        )
        raise ConfigError(
            problem(
                "reshape", f"{source}, a checkpoint of megalith", "it holds whole tensors, which any layout loads", cure
            )
        )
    if found not in ("megatron", "deepspeed", "torch_dist"):
        rule = "reshape goes from one layout of Megatron to another"
        raise ConfigError(
            problem(
                "reshape", f"{source}, of the format {found}", rule, "Write megalith checkpoint export --to megatron"
            )
        )


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The model's tensors in another format; the optimizer's stay as they are. Raises CheckpointError for what it cannot hold."""
    check_range({name: lazy for name, lazy in weights.tensors.items() if name.startswith("model/")}, dtype)
    tensors = {name: lazy.to(dtype) if name.startswith("model/") else lazy for name, lazy in weights.tensors.items()}
    return dataclasses.replace(weights, tensors=tensors)


def verify(source: pathlib.Path, result: pathlib.Path, options: Options | None = None) -> float:
    """Largest difference of logits between transformers' model and ours, over the largest logit.

    Compared are the two sides of a conversion; where neither is a Hugging Face folder, what `result` gives when exported to one.
    options: those that `source` was read with. Raises CheckpointError where it is over TOLERANCE, with what differs; MissingPackage
    where transformers is not installed.
    """
    options = options or Options()
    plain = dataclasses.replace(options, overrides={}, iteration=None)  # for what was made: it lacks nothing
    sides = {formats.recognise(path): (path, given) for path, given in ((source, options), (result, plain))}
    with tempfile.TemporaryDirectory() as aside:
        if "huggingface" not in sides:
            FORMATS.find("huggingface").write(formats.read(result), pathlib.Path(aside), Options())
            return _verified((pathlib.Path(aside), Options()), (result, plain))
        original = sides.pop("huggingface")
        return _verified(original, next(iter(sides.values()), (result, plain)))


def _verified(original: tuple[pathlib.Path, Options], ours: tuple[pathlib.Path, Options]) -> float:
    worst = compare(original[0], ours[0], options=ours[1])
    if not worst <= TOLERANCE:
        rule = f"both compute the same, to {TOLERANCE} of the largest logit"
        raise CheckpointError(problem("--verify: relative difference of logits", worst, rule, _cause(original, ours)))
    return worst


def _cause(original: tuple[pathlib.Path, Options], ours: tuple[pathlib.Path, Options]) -> str:
    """Why logits differ, as far as the two sides tell it, and what to do."""
    one, other = (
        formats.read(path, options=dataclasses.replace(options, dtype=None)) for path, options in (original, ours)
    )
    forms = form(one.config.model), form(other.config.model)
    if wrong := [f"{name} {value} and {forms[1][name]}" for name, value in forms[0].items() if forms[1][name] != value]:
        return f"The two are different models ({', '.join(wrong)}); convert once more, with the flags of the model that are wrong"
    names = [name for name in one if name.startswith("model/")]
    differing = [name for name in names if not _close(one[name], other[name], 0.0)]
    narrow = min(
        (weights.tensors[name].dtype for weights in (one, other) for name in names),
        key=lambda each: torch.finfo(each).eps * -1,
    )
    if differing and all(_close(one[name], other[name], torch.finfo(narrow).eps) for name in differing):
        return f"Weights of one side were rounded to {str(narrow).removeprefix('torch.')}: nothing else differs. Leave out --dtype to compare"
    if differing:
        own = "Say how rows are ordered with --qkv-layout and --swiglu-order, if the source is of Megatron; else one of the two was changed"
        return f"These tensors differ: {', '.join(differing[:4])}{' ...' * (len(differing) > 4)}. {own} after the conversion"
    return "Weights and forms agree, so transformers reads the folder otherwise: report it with config.json and the versions of both"


def _close(one: Tensor, other: Tensor, eps: float) -> bool:
    """Whether each element is the other's, or as near as rounding with this relative error makes it."""
    one, other = one.float(), other.float()
    return one.shape == other.shape and bool(((one - other).abs() <= eps * one.abs() + 1e-7 * bool(eps)).all())


def compare(original: pathlib.Path, ours: pathlib.Path, tokens: int = 32, options: Options | None = None) -> float:
    """The difference, of a Hugging Face folder and anything that load_plain opens (with `options`). Both in float32, on made-up ids."""
    transformers = require("transformers", "--verify")
    from megalith.runtime.load import load_plain

    given = huggingface_files.read_json(original / huggingface.CONFIG)
    _, family = huggingface.family_of(given, original / huggingface.CONFIG)
    name = (
        given["architectures"][0] if family.heads(given) else family.architecture
    )  # a folder without all heads: as what it is
    try:
        theirs: Any = getattr(transformers, name).from_pretrained(original, dtype=torch.float32).eval()
    except Exception as error:  # whatever it lacks: a library of its own, a file, a field
        rule = f"transformers {transformers.__version__} must open {original} as {name}"
        cure = "Mend what it names, or leave --verify out"
        raise ConfigError(problem("--verify", f"{type(error).__name__}: {error}", rule, cure)) from None
    model, run_config, _ = load_plain(ours, device="cpu", options=options)
    length = min(tokens, run_config.model.max_position_embeddings or tokens)
    small = run_config.replace(seq_length=length, global_batch_size=2)
    shape = small.model.architecture.find("batch")(small, 0)["input_ids"].shape
    ids = torch.randint(run_config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    second = {"decoder_input_ids": ids.flip(1)} if run_config.model.decoder_layers else {}
    with torch.no_grad():
        wanted: Tensor = theirs(ids, **second)[0]  # logits, over the vocabulary or of classes; BERT has a second head
        found = model(ids, **second)
        found = found[0] if isinstance(found, tuple) else found
        if wanted.shape != found.shape:
            rule = f"it compares the logits of {run_config.model.model_type}, and this class gives none"
            raise ConfigError(problem("--verify", name, rule, "Leave --verify out"))
        worst = float((found - wanted).abs().max() / wanted.abs().max())
    return worst
