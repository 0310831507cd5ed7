"""`megalith.load`: a path in, a model to use out."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

import torch
from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.data.tokenizers import load_tokenizer
from megalith.runtime.load import load_plain, reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    iteration: int | None = None,
    qkv_layout: str = "auto",
    swiglu_order: str = "auto",
    tokenizer: str | os.PathLike | None = None,
    **model_fields: Any,
) -> nn.Module:
    """A trained model on one device, in evaluation mode: `model(input_ids)` gives logits [batch, sequence, vocabulary].

    path: a run's folder, a folder of checkpoints, one checkpoint, a Hugging Face folder, a Megatron directory or a zip archive of one,
    or its URL. device: auto, cpu, cuda or xpu. dtype: of the weights and of
    the computation, float32 unless another is named (bfloat16 halves the memory). iteration: which checkpoint (the latest).
    qkv_layout, swiglu_order, model_fields (num_attention_heads=16, ...): what files of another format lack, or say wrongly, by the
    names that `megalith checkpoint import` has for it. tokenizer: folder of tokenizer files that go before the checkpoint's own.

    The result has `.config` (its ModelConfig), `.run_config` (the whole RunConfig), `.tokenizer` (None where the checkpoint
    carries none) and `.notes`, what is to be told of files of another format; they are also shown on stderr.
    Raises CheckpointError where there is no good checkpoint or `dtype` cannot hold its weights, ConfigError for a device, dtype or
    field there is not.
    """
    if isinstance(dtype, str):
        if SHORT.get(dtype, dtype) not in DTYPES:
            raise ConfigError(problem("--dtype", dtype, f"the known ones are {', '.join(DTYPES)}", "Use one of them"))
        dtype = DTYPES[SHORT.get(dtype, dtype)]
    options = reading(qkv_layout, swiglu_order, model_fields)
    model, run_config, own = load_plain(path, device=device, dtype=dtype or torch.float32, iteration=iteration, options=options)
    for note in model.notes:
        print(f"{path}: {note}", file=sys.stderr)
    folder = tokenizer if tokenizer is not None else own
    model.run_config = run_config
    model.tokenizer = load_tokenizer(pathlib.Path(folder), run_config.data) if folder is not None else None
    return model
