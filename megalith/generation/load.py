"""`megalith.load`: a path in, a model to use out."""

from __future__ import annotations

import os

import torch
from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.data.tokenizers import load_tokenizer
from megalith.runtime.load import load_plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(
    path: str | os.PathLike, *, device: str | torch.device = "auto", dtype: str | torch.dtype | None = None, iteration: int | None = None
) -> nn.Module:
    """A trained model on one device, in evaluation mode: `model(input_ids)` gives logits [batch, sequence, vocabulary].

    path: a run's folder, a folder of checkpoints, one checkpoint, a Hugging Face folder, a Megatron directory or a zip archive of one,
    or its URL. device: auto, cpu, cuda or xpu. dtype: of the weights and of
    the computation, float32 unless another is named (bfloat16 halves the memory). iteration: which checkpoint (the latest).

    The result has `.config` (its ModelConfig), `.run_config` (the whole RunConfig) and `.tokenizer` (None where the checkpoint
    carries none). Raises CheckpointError where there is no good checkpoint, ConfigError for a device or dtype there is not.
    """
    if isinstance(dtype, str):
        if SHORT.get(dtype, dtype) not in DTYPES:
            raise ConfigError(problem("--dtype", dtype, f"the known ones are {', '.join(DTYPES)}", "Use one of them"))
        dtype = DTYPES[SHORT.get(dtype, dtype)]
    model, run_config, tokenizer = load_plain(path, device=device, dtype=dtype or torch.float32, iteration=iteration)
    model.run_config = run_config
    model.tokenizer = load_tokenizer(tokenizer, run_config.data) if tokenizer is not None else None
    return model
