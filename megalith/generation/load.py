"""`megalith.load`: a path in, a model to use out."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

import torch
from torch import nn

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config import environment
from megalith.config.run import RunConfig
from megalith.config.sections.data import DataConfig
from megalith.data.tokenizers.given import TokenizerOverride, vocab_size_notes
from megalith.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalith.generation.model import TextModel
from megalith.runtime.load import format_options, load_model, load_runtime

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(
    path: str | os.PathLike | nn.Module | TextModel,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    iteration: int | None = None,
    adapter: str | os.PathLike | None = None,
    merge_adapter: bool = True,
    qkv_layout: str = "auto",
    swiglu_order: str = "auto",
    replicas: str = "equal",
    tokenizer: str | os.PathLike | None = None,
    tokenizer_type: str | None = None,
    vocab_file: str | os.PathLike | None = None,
    merge_file: str | os.PathLike | None = None,
    tokenizer_model: str | os.PathLike | None = None,
    tensor_model_parallel_size: int | None = None,
    pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int | None = None,
    **model_fields: Any,
) -> TextModel:
    """A trained model, in evaluation mode; called with ids it gives logits [batch, sequence, vocabulary].

    path: a run's folder, a folder of checkpoints, one checkpoint, a Hugging Face folder, a Megatron directory or a zip
    archive of one, or its URL; or a model in memory, of megalith or of transformers. device: auto, cpu, cuda or xpu.
    dtype: of the weights and of the computation, float32 by default (bfloat16 halves the memory). iteration: which
    checkpoint (default: the latest). adapter: low-rank adapters that were trained on it, a LoRA run's folder or one of
    PEFT; path may also be such a folder, where the base that it names is on this machine. merge_adapter: whether they
    are added to the weights, which is faster; False keeps them apart, which is what was trained. qkv_layout,
    swiglu_order, replicas, model_fields (num_attention_heads=16, ...): what other formats lack, or state wrongly, by
    the names of the options of `megalith checkpoint import`. tokenizer: a folder of tokenizer files to use instead of
    the checkpoint's; or the files themselves, as for `pretrain` (vocab_file and merge_file of GPT-2, vocab_file of
    BERT, tokenizer_model). tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: with one of
    them (1 too) all processes of torchrun load the model together, each its part of it; what they leave are
    data-parallel replicas (and so are, for generation, the context-parallel ones, which only evaluation uses). The
    result generates and scores text, on all processes at once. Without them each process loads a model of its own.

    The result is a TextModel; it has `.config` (its ModelConfig), `.run_config` (the whole RunConfig), `.tokenizer`
    (None where the checkpoint has none) and `.notes`, messages about files of another format, which are also printed to
    stderr. Raises CheckpointError where there is no valid checkpoint or `dtype` cannot hold its weights, ConfigError
    for an unknown device, dtype or field.
    """
    if isinstance(dtype, str):
        if DTYPE_ALIASES.get(dtype, dtype) not in DTYPES:
            cure = "Write --dtype float32, or --dtype bfloat16 for half of the memory"
            raise ConfigError(problem("--dtype", dtype, f"must be one of {', '.join(DTYPES)}", cure))
        dtype = DTYPES[DTYPE_ALIASES.get(dtype, dtype)]
    tokenizer_flags = {
        "tokenizer_type": tokenizer_type,
        "vocab_file": vocab_file,
        "merge_file": merge_file,
        "tokenizer_model": tokenizer_model,
    }
    flags = {name: str(value) for name, value in tokenizer_flags.items() if value is not None}
    given = TokenizerOverride(tokenizer, flags)
    options = format_options(qkv_layout, swiglu_order, replicas, model_fields) | {"vocabulary_size": given.vocab_size}
    options |= {} if adapter is None else {"adapter": adapter}
    path = path.model if isinstance(path, TextModel) else path
    sizes = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "context_parallel_size": context_parallel_size,
    }
    given_sizes, runtime = [size for size in sizes.values() if size is not None], None
    if given_sizes and (environment.world_size() > 1 or max(given_sizes) > 1):
        layout = RunConfig().replace(
            **{name: size or 1 for name, size in sizes.items()},
            device=device.type if isinstance(device, torch.device) else device,
        )  # fmt: skip
        runtime, source = load_runtime(
            path, layout.parallel, dtype=dtype or torch.float32, iteration=iteration, options=options,
            merge_adapter=merge_adapter,
        )  # fmt: skip
        model, run_config, tokenizer_folder = runtime.stages[0].model, source.config, source.tokenizer
        notes = source.notes
    else:
        model, run_config, tokenizer_folder = load_model(
            path, device=device, dtype=dtype or torch.float32, iteration=iteration, options=options,
            merge_adapter=merge_adapter,
        )  # fmt: skip
        notes = vars(model).pop("notes", ())  # the module itself keeps no extra attribute
    text_tokenizer = None
    if given:
        text_tokenizer = given.build(run_config.data)
        notes = (
            *notes,
            *given.notes,
            *vocab_size_notes(text_tokenizer.vocab_size, model.config.vocab_size),
            *_tokenizer_notes(text_tokenizer, tokenizer_folder, run_config.data),
        )
    elif tokenizer_folder is not None:
        text_tokenizer = load_tokenizer(tokenizer_folder, run_config.data)
    name = path if isinstance(path, (str, os.PathLike)) else type(path).__name__
    for note in notes if runtime is None or runtime.mesh.is_main_process else ():
        print(f"{name}: {note}", file=sys.stderr)
    return TextModel(model, text_tokenizer, run_config, notes, runtime)


def _tokenizer_notes(given: Tokenizer, folder: pathlib.Path | None, data: DataConfig) -> list[str]:
    """A note where the tokens of the given tokenizer are not those of the checkpoint's tokenizer, if it has one."""
    try:
        stored = given if folder is None else load_tokenizer(folder, data)
        same = stored.fingerprint() == given.fingerprint() or stored.tokens() == given.tokens()
    except (DataError, ConfigError):  # the very reason to give another
        return []
    return [] if same else [f"the tokenizer is the one given, whose tokens are not those of {folder}"]
