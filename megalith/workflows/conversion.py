"""Weights from one format to another: read, write, and check that the result computes what the source computes."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, HuggingFaceOptions, adapters, sources
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface import files as huggingface_files
from megalith.checkpoint.formats.huggingface.family import architecture_fields
from megalith.checkpoint.formats.options import Options, as_mapping
from megalith.checkpoint.store.folder import new_folder
from megalith.checkpoint.tensors.lazy import check_range
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.extras import require
from megalith.config.adapters import is_trained
from megalith.config.flags.text import Words
from megalith.data.tokenizers.given import FIELDS, TokenizerOverride
from megalith.runtime.load import check_no_overrides
from megalith.workflows.tokenizer_files import files_for_export, with_tokenizer

if TYPE_CHECKING:
    from megalith.workflows.conversion_request import ConversionRequest

TOLERANCE = 1e-4  # of the largest logit: sums in another order differ by less, a wrong name or layout by 1


def run_request(request: ConversionRequest, notice: Callable[[str], None]) -> None:
    """Fetch the source, convert it, and verify the result if that is asked for. notice: called with each output line.

    Raises as `convert` and `verify` do, and ConfigError where nothing needs reshaping.
    """
    for line in request.notes:
        notice(line)
    source = sources.local(request.source, sha256=request.sha256, notice=notice)
    if request.verb == "reshape":
        check_reshape(source, request.format)
    weights = convert(
        source,
        request.folder,
        to=request.to,
        format=request.format,
        options=request.options,
        overwrite=request.overwrite,
        notice=notice,
    )
    everything = request.writes_optimizer
    written = {name: lazy for name, lazy in weights.tensors.items() if everything or name.startswith("model/")}
    if request.to == "peft":
        written = {name: lazy for name, lazy in written.items() if is_trained(name, weights.config.model)}
    if request.print_structure:
        for name, lazy in written.items():
            notice(f"{name:<60} {list(lazy.shape)} {str(lazy.dtype).removeprefix('torch.')}")
    for line in weights.notes:
        notice(line)
    notice(f"{len(written)} tensors -> {request.folder}")
    if request.verify:
        worst = verify(source, request.folder, request.options)
        notice(f"verified: the logits differ from those of transformers by at most {worst:.1e} of the largest")


def convert(
    source: pathlib.Path,
    folder: pathlib.Path,
    *,
    to: str,
    format: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> Weights:
    """Write what is at `source` (in `format`, or the one recognised) into the new `folder` in the format `to`.

    Returns what was read. Works tensor by tensor; the folder appears when it is complete. options: {name: value} of
    options of both formats (formats/options.py); each takes those that it has. overwrite: replace an earlier conversion
    in `folder`. Adapters of the source are merged into its weights, but for the format peft. Raises CheckpointError
    where the source is damaged or incomplete, or the target format cannot hold it; LockedError while another process
    writes there.
    """
    options = as_mapping(options)
    target = FORMATS.find(to)
    if target.write is None:
        cure = f"Write --to {', '.join(name for name in FORMATS if FORMATS.find(name).write)}"
        raise ConfigError(problem("--to", to, "must name a format that can be written: this one is only read", cure))
    folder_of_tokenizer, overrides = options.get("tokenizer"), options.get("overrides", {})
    given = TokenizerOverride(folder_of_tokenizer, overrides)
    inputs = [source, *filter(None, [folder_of_tokenizer, options.get("adapter")])]
    with (
        new_folder(folder, inputs=inputs, overwrite=overwrite, notice=notice) as unfinished,
        tempfile.TemporaryDirectory() as temporary,
    ):
        format = format or formats.recognise(source)
        holds_tokenizer = to in ("megalith", "huggingface")  # Megatron's directories hold none
        vocabulary_size = {"vocabulary_size": given.vocab_size} if holds_tokenizer else {}
        given_options = {**options, **vocabulary_size}
        weights = formats.read(source, format, formats.select_options(format, given_options, [target.options]))
        if format == "megalith":
            stored = weights.config.flat()
            check_no_overrides(
                source,
                [name for name, value in overrides.items() if name not in FIELDS and stored[name] != value],
            )
        if to != "peft":
            weights = adapters.merge(weights, widen=bool(options.get("dtype")))
        write_options: Any = target.options.select(options)
        if holds_tokenizer:
            weights, write_options = with_tokenizer(weights, write_options, given, pathlib.Path(temporary) / "given")
        if options.get("dtype") and to == "megalith":
            weights = cast(weights, getattr(torch, options["dtype"]))
        notes: tuple[str, ...] = ()
        if to == "huggingface":
            (files := pathlib.Path(temporary) / "export").mkdir()
            write_options, notes = files_for_export(weights, write_options, files)
            notes += huggingface.export_notes(weights.config.model)
        target.write(weights, unfinished, write_options)
    return dataclasses.replace(weights, notes=tuple(dict.fromkeys((*weights.notes, *notes))))


def check_reshape(source: pathlib.Path, format: str | None) -> None:
    """Raise ConfigError, with what to do instead, where `source` is of a format that needs no reshaping."""
    found = format or formats.recognise(source)
    if found == "megalith":
        cure = (
            "Give --tensor-model-parallel-size and --pipeline-model-parallel-size to the command that loads it; "
            "for Megatron, write megalith checkpoint export --to megatron"
        )
        rule = "must be files of Megatron, because a checkpoint of megalith holds whole tensors, which any layout loads"
        raise ConfigError(problem("The source of reshape", str(source), rule, cure))
    if found not in ("megatron", "deepspeed", "torch_dist"):
        rule = "must be files of Megatron, because reshape goes from one layout of Megatron to another"
        cure = "Write megalith checkpoint export --to megatron"
        raise ConfigError(problem("The source of reshape", Words(f"{source}, of the format {found}"), rule, cure))


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights with the model's tensors in another dtype; the optimizer's stay as they are.

    Raises CheckpointError for values that the dtype cannot hold.
    """
    check_range({name: lazy for name, lazy in weights.tensors.items() if name.startswith("model/")}, dtype)
    tensors = {name: lazy.to(dtype) if name.startswith("model/") else lazy for name, lazy in weights.tensors.items()}
    return dataclasses.replace(weights, tensors=tensors)


def verify(source: pathlib.Path, result: pathlib.Path, options: Options | Mapping[str, Any] | None = None) -> float:
    """Largest difference of logits between transformers' model and megalith's, over the largest logit.

    The two sides of a conversion are compared; where neither is a Hugging Face folder, `result` is compared with what
    it gives when exported to one. options: those that `source` was read with. Raises CheckpointError where the
    difference is over TOLERANCE, with what differs; MissingPackage where transformers is not installed.
    """
    options = as_mapping(options)
    # What was written states the whole model, and is the only checkpoint there.
    for_result = {name: value for name, value in options.items() if name not in ("overrides", "iteration", "adapter")}
    sides = {formats.recognise(path): (path, given) for path, given in ((source, options), (result, for_result))}
    with tempfile.TemporaryDirectory() as temporary:
        if "huggingface" not in sides or formats.recognise(result) == "peft":  # its base computes something else
            exported = pathlib.Path(temporary)
            whole = adapters.merge(formats.read(result), widen=True)
            FORMATS.find("huggingface").write(whole, exported, HuggingFaceOptions())
            return _check_difference((exported, {}), (result, for_result))
        original = sides.pop("huggingface")
        return _check_difference(original, next(iter(sides.values()), (result, for_result)))


Side = tuple[pathlib.Path, Mapping[str, Any]]  # of a conversion: where it is, and the options that it is read with


def _check_difference(original: Side, converted: Side) -> float:
    """The relative difference of logits. Raises CheckpointError where it is over TOLERANCE."""
    worst = compare(original[0], converted[0], options=converted[1])
    if not worst <= TOLERANCE:
        rule = f"must be at most {TOLERANCE} of the largest logit, for both to compute the same"
        cause = _cause(original, converted)
        raise CheckpointError(problem("--verify: the relative difference of logits", worst, rule, cause))
    return worst


def _cause(original: Side, converted: Side) -> str:
    """Why logits differ, as far as the two sides show it, and what to do."""
    one, other = (adapters.merge(formats.read(path, options=options)) for path, options in (original, converted))
    forms = architecture_fields(one.config.model), architecture_fields(other.config.model)
    if wrong := [f"{name} {value} and {forms[1][name]}" for name, value in forms[0].items() if forms[1][name] != value]:
        cure = "convert once more, with the flags of the model that are wrong"
        return f"The two are different models ({', '.join(wrong)}); {cure}"
    names = [name for name in one if name.startswith("model/")]
    differing = [name for name in names if not _close(one[name], other[name], 0.0)]
    narrow = min(
        (weights.tensors[name].dtype for weights in (one, other) for name in names),
        key=lambda each: torch.finfo(each).eps * -1,
    )
    if differing and all(_close(one[name], other[name], torch.finfo(narrow).eps) for name in differing):
        dtype = str(narrow).removeprefix("torch.")
        return f"Weights of one side were rounded to {dtype}: nothing else differs. Leave out --dtype to compare"
    if differing:
        shown = ", ".join(differing[:4]) + " ..." * (len(differing) > 4)
        return (
            f"These tensors differ: {shown}. If the source is of Megatron, state how its rows are ordered with "
            "--qkv-layout and --swiglu-order; else one of the two was changed after the conversion"
        )
    return (
        "Weights and settings agree, so transformers reads the folder in another way: report it with config.json and "
        "the versions of both"
    )


def _close(one: Tensor, other: Tensor, eps: float) -> bool:
    """Whether each element equals the other's, or differs by no more than rounding with this relative error."""
    one, other = one.float(), other.float()
    return one.shape == other.shape and bool(((one - other).abs() <= eps * one.abs() + 1e-7 * bool(eps)).all())


def compare(
    original: pathlib.Path,
    converted: pathlib.Path,
    tokens: int = 32,
    options: Options | Mapping[str, Any] | None = None,
) -> float:
    """The relative difference of logits between a Hugging Face folder and a converted checkpoint, read with `options`.

    Both compute in float32, on random ids.
    """
    transformers = require("transformers", "--verify")
    from megalith.runtime.load import load_model

    given = huggingface_files.read_json(original / huggingface.CONFIG)
    _, family = huggingface.family_of(given, original / huggingface.CONFIG)
    # A folder without all heads is opened as the class that it names.
    name = given["architectures"][0] if family.lacked_heads(given) else family.architecture
    try:
        reference: Any = getattr(transformers, name).from_pretrained(original, dtype=torch.float32).eval()
    except Exception as error:  # whatever it lacks: a library of its own, a file, a field
        rule = f"must open {original} as {name}"
        cure = "Correct what it names, or leave --verify out"
        found = Words(f"{type(error).__name__}: {error}")
        raise ConfigError(problem(f"--verify: transformers {transformers.__version__}", found, rule, cure)) from None
    model, run_config, _ = load_model(converted, device="cpu", options=options)
    length = min(tokens, run_config.model.max_position_embeddings or tokens)
    small = run_config.replace(seq_length=length, global_batch_size=2)
    shape = small.model.architecture.find("batch")(small, 0)["input_ids"].shape
    ids = torch.randint(run_config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    second = {"decoder_input_ids": ids.flip(1)} if run_config.model.decoder_layers else {}
    with torch.no_grad():
        expected: Tensor = reference(ids, **second)[0]  # logits, over the vocabulary or of classes; BERT has two heads
        logits = model(ids, **second)
        logits = logits[0] if isinstance(logits, tuple) else logits
        if expected.shape != logits.shape:
            rule = f"compares the logits of {run_config.model.model_type}, and this class of transformers has none"
            raise ConfigError(problem("--verify", name, rule, "Leave --verify out"))
        worst = float((logits - expected).abs().max() / expected.abs().max())
    return worst
