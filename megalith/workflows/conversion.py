"""Weights from one format to another: read, write, and prove that the result computes what the source computes."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint import formats, huggingface, huggingface_files
from megalith.checkpoint.folder import new_folder
from megalith.checkpoint.formats import FORMATS, Options
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.extras import require

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
        raise ConfigError(problem("--to", to, "this format is only read", f"Write --to {', '.join(n for n in FORMATS if n != to)}"))
    inputs = [source, *([options.tokenizer] if options.tokenizer else [])]
    with new_folder(folder, inputs=inputs, overwrite=overwrite, notice=notice) as place:
        weights = formats.read(source, format, options)
        if options.dtype and to == "megalith":
            weights = cast(weights, getattr(torch, options.dtype))
        found.write(weights, place, options)
    return weights


def check_reshape(source: pathlib.Path, format: str | None) -> None:
    """Raise ConfigError where `source` is of a format that needs no reshaping, and say what to do instead."""
    found = format or formats.recognise(source)
    if found == "megalith":
        cure = (
            "Give --tensor-model-parallel-size and --pipeline-model-parallel-size to the command that loads it; "
            "for Megatron, write megalith checkpoint export --to megatron"
        )
        raise ConfigError(problem("reshape", f"{source}, a checkpoint of megalith", "it holds whole tensors, which any layout loads", cure))
    if found not in ("megatron", "deepspeed", "torch_dist"):
        rule = "reshape goes from one layout of Megatron to another"
        raise ConfigError(problem("reshape", f"{source}, of the format {found}", rule, "Write megalith checkpoint export --to megatron"))


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The model's tensors in another format; the optimizer's stay as they are."""
    tensors = {name: lazy.to(dtype) if name.startswith("model/") else lazy for name, lazy in weights.tensors.items()}
    return dataclasses.replace(weights, tensors=tensors)


def verify(source: pathlib.Path, result: pathlib.Path, options: Options | None = None) -> float:
    """Largest difference of logits between transformers' model and ours, over the largest logit.

    Compared are the two sides of a conversion; where neither is a Hugging Face folder, what `result` gives when exported to one.
    Raises CheckpointError where it is over TOLERANCE, MissingPackage where transformers is not installed.
    """
    sides = {formats.recognise(path): path for path in (source, result)}
    with tempfile.TemporaryDirectory() as aside:
        if "huggingface" not in sides:
            FORMATS.find("huggingface").write(formats.read(result), pathlib.Path(aside), options or Options())
            return compare(pathlib.Path(aside), result)
        return compare(sides["huggingface"], next((path for name, path in sides.items() if name != "huggingface"), result))


def compare(original: pathlib.Path, ours: pathlib.Path, tokens: int = 32) -> float:
    """`verify`, of a Hugging Face folder and anything that load_plain opens. Both in float32, on made-up ids."""
    transformers = require("transformers", "--verify")
    from megalith.runtime.load import load_plain

    given = huggingface_files.read_json(original / huggingface.CONFIG)
    _, family = huggingface.family_of(given, original / huggingface.CONFIG)
    name = given["architectures"][0] if family.heads(given) else family.architecture  # a folder without all heads: as what it is
    try:
        theirs: Any = getattr(transformers, name).from_pretrained(original, dtype=torch.float32).eval()
    except Exception as error:  # whatever it lacks: a library of its own, a file, a field
        rule = f"transformers {transformers.__version__} must open {original} as {name}"
        cure = "Mend what it names, or leave --verify out"
        raise ConfigError(problem("--verify", f"{type(error).__name__}: {error}", rule, cure)) from None
    model, run_config, _ = load_plain(ours, device="cpu")
    length = min(tokens, run_config.model.max_position_embeddings or tokens)
    ids = torch.randint(run_config.model.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    second = {"decoder_input_ids": ids.flip(1)} if run_config.model.decoder_layers else {}
    with torch.no_grad():
        wanted: Tensor = theirs(ids, **second)[0]  # logits over the vocabulary; BERT has a second head
        if wanted.shape[-1] != run_config.model.vocab_size:
            rule = "it compares logits over the vocabulary, and this class gives none"
            raise ConfigError(problem("--verify", name, rule, "Leave --verify out"))
        found = model(ids, **second)
        worst = float(((found[0] if isinstance(found, tuple) else found) - wanted).abs().max() / wanted.abs().max())
    if not worst <= TOLERANCE:
        rule = f"both compute the same, to {TOLERANCE} of the largest logit"
        cure = "Say how rows are ordered with --qkv-layout and --swiglu-order, and if that is not it report it with config.json"
        raise CheckpointError(problem("--verify: relative difference of logits", worst, rule, cure))
    return worst
