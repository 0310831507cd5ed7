"""`megalith.load`: a path in, a model to use out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from typing import Any

import torch
from torch import nn

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.sections.data import DataConfig
from megalith.data.tokenizers.given import GivenTokenizer, misfit
from megalith.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalith.generation.model import TextModel
from megalith.runtime.load import load_plain, reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(
    path: str | os.PathLike | nn.Module | TextModel,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    iteration: int | None = None,
    qkv_layout: str = "auto",
    swiglu_order: str = "auto",
    replicas: str = "equal",
    tokenizer: str | os.PathLike | None = None,
    tokenizer_type: str | None = None,
    vocab_file: str | os.PathLike | None = None,
    merge_file: str | os.PathLike | None = None,
    tokenizer_model: str | os.PathLike | None = None,
    **model_fields: Any,
) -> TextModel:
    """A trained model on one device, in evaluation mode; called with ids it gives logits [batch, sequence, vocabulary].

    path: a run's folder, a folder of checkpoints, one checkpoint, a Hugging Face folder, a Megatron directory or a zip
    archive of one, or its URL; or a model in memory, ours or of transformers. device: auto, cpu, cuda or xpu. dtype: of
    the weights and of the computation, float32 unless another is named (bfloat16 halves the memory). iteration: which
    checkpoint (the latest). qkv_layout, swiglu_order, replicas, model_fields (num_attention_heads=16, ...): what other
    formats lack, or say wrongly, by the names that `megalith checkpoint import` has for it. tokenizer: folder of
    tokenizer files that go before the checkpoint's own; or the files themselves, as `pretrain` has them (vocab_file and
    merge_file of GPT-2, vocab_file of BERT, tokenizer_model).

    The result is a TextModel; it has `.config` (its ModelConfig), `.run_config` (the whole RunConfig), `.tokenizer`
    (None where the checkpoint carries none) and `.notes`, what is to be told of files of another format; they are also
    shown on stderr. Raises CheckpointError where there is no good checkpoint or `dtype` cannot hold its weights,
    ConfigError for a device, dtype or field there is not.
    """
    if isinstance(dtype, str):
        if SHORT.get(dtype, dtype) not in DTYPES:
            raise ConfigError(problem("--dtype", dtype, f"the known ones are {', '.join(DTYPES)}", "Use one of them"))
        dtype = DTYPES[SHORT.get(dtype, dtype)]
    named = {
        "tokenizer_type": tokenizer_type,
        "vocab_file": vocab_file,
        "merge_file": merge_file,
        "tokenizer_model": tokenizer_model,
    }
    given = GivenTokenizer(tokenizer, {name: str(value) for name, value in named.items() if value is not None})
    options = dataclasses.replace(reading(qkv_layout, swiglu_order, replicas, model_fields), words=given.words)
    path = path.model if isinstance(path, TextModel) else path
    model, run_config, own = load_plain(
        path, device=device, dtype=dtype or torch.float32, iteration=iteration, options=options
    )
    notes = vars(model).pop("notes", ())  # nothing is hung on the module
    words = load_tokenizer(own, run_config.data) if own is not None and not given else None
    if given:
        words = given.make(run_config.data)
        notes = (
            *notes,
            *given.notes,
            *misfit(words.vocab_size, model.config.vocab_size),
            *_other_words(words, own, run_config.data),
        )
    called = path if isinstance(path, (str, os.PathLike)) else type(path).__name__
    for note in notes:
        print(f"{called}: {note}", file=sys.stderr)
    return TextModel(model, words, run_config, notes)


def _other_words(given: Tokenizer, own: pathlib.Path | None, data: DataConfig) -> list[str]:
    """What to tell of a tokenizer that is not the one that the checkpoint has; nothing where it has none or its words
    are the same.
    """
    try:
        theirs = given if own is None else load_tokenizer(own, data)
        same = theirs.fingerprint() == given.fingerprint() or theirs.tokens() == given.tokens()
    except (DataError, ConfigError):  # the very reason to give another
        return []
    return [] if same else [f"the tokenizer is the one given, whose words are not those of {own}"]
