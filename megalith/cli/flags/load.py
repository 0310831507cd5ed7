"""Flags of the verbs that load a model to write text with it: which checkpoint, how, and what its files lack."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megalith.cli.checkpoint_convert import MEGATRON_FLAGS
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.urls import is_url
from megalith.config import environment
from megalith.config.flags.text import fail, flag
from megalith.config.flags.values import fields

if TYPE_CHECKING:
    from megalith.generation.model import TextModel

# Flags for a tokenizer's files, where no folder is named
TOKENIZER = {"tokenizer_type": "TYPE", "vocab_file": "FILE", "merge_file": "FILE", "tokenizer_model": "PATH"}
# The processes that these leave hold replicas, which share the prompts.
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
CONTEXT = "context_parallel_size"  # splits sequences in evaluation; in generation it would only be replicas
# Fields of the model that files of other programs lack most often
MODEL_HELP = ("num_attention_heads", "vocab_size", "position_embedding_type")
NAME_TOKENIZER = (
    "Name its folder with --tokenizer, or its files: --vocab-file FILE --merge-file FILE of GPT-2, "
    "--tokenizer-model FILE"
)
WHAT_TO_LOAD = "a run's folder, a checkpoint, or weights of Hugging Face or Megatron"


def add_load_flags(parser: argparse.ArgumentParser, layout: Sequence[str] = LAYOUT) -> None:
    """How the model is loaded; which one, --load, is the verb's. layout: the fields that the verb can use."""
    add = parser.add_argument
    add("--adapter", metavar="PATH", help="low-rank adapters that were trained on it: a LoRA run or a PEFT folder")
    add("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    add("--dtype", default="float32", metavar="TYPE", help="float32, bfloat16 or float16")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or xpu")
    for name in layout:
        help = f"under torchrun: {fields()[name].metadata['help']} (default: 1)"
        add(flag(name), *fields()[name].metadata["flags"], type=int, metavar="N", help=help)


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """What files of another format do not say, in a group of its own."""
    group = parser.add_argument_group(
        "what files of another format do not say (every flag of the model that `pretrain` has is known)"
    )
    add = group.add_argument
    add("--tokenizer", metavar="FOLDER", help="folder of tokenizer files (default: those that the checkpoint has)")
    for name, metavar in TOKENIZER.items():
        help = f"as in `megalith pretrain`: {fields()[name].metadata['help']}"
        add(flag(name), *fields()[name].metadata["flags"], metavar=metavar, help=help)
    for each in MEGATRON_FLAGS:
        add(each.name, default=each.choices[0], choices=each.choices, help=each.help)
    for name in model_fields():
        field = fields()[name]
        help = f"as in `megalith pretrain`: {field.metadata['help']}".replace("%", "%%")
        options: dict[str, Any] = {list: {"nargs": "*"}, bool: {"nargs": "?", "const": "true"}}.get(field.kind, {})
        metavar = "N" if field.kind is int else "TEXT"
        help = help if name in MODEL_HELP else argparse.SUPPRESS
        add(flag(name), default=argparse.SUPPRESS, metavar=metavar, help=help, **options)


def model_fields() -> list[str]:
    """The names of all fields of the model, whose flags may be given for files that lack them."""
    return [name for name, each in fields().items() if each.section == "model"]


def check_paths(args: argparse.Namespace, load: str = "--load") -> None:
    """Raise CheckpointError for each path that names nothing, before anything slow begins.

    load: what the user calls that of the model.
    """
    named = {name: getattr(args, name) for name in ("load", "adapter", "tokenizer", "vocab_file", "merge_file")}
    absent = [name for name, path in named.items() if path and not is_url(path) and not pathlib.Path(path).exists()]
    texts = [
        problem(
            load if name == "load" else flag(name),
            named[name],
            "must name a file or folder that exists",
            "Correct the path",
        )
        for name in absent
    ]
    fail(texts, CheckpointError)


def load_model(args: argparse.Namespace) -> TextModel:
    """The model that the flags name, with a tokenizer. Under torchrun all processes load it together."""
    from megalith.generation.load import load  # here, because it imports torch

    typed = {name: getattr(args, name) for name in model_fields() if hasattr(args, name)}
    typed |= {name: getattr(args, name) for name in (*TOKENIZER, "tokenizer", "qkv_layout", "swiglu_order", "replicas")}
    sizes = {name: getattr(args, name, None) for name in (*LAYOUT, CONTEXT)}
    if environment.world_size() > 1 or any(sizes.values()):
        typed |= {name: size or 1 for name, size in sizes.items()}
    model = load(
        args.load, device=args.device, dtype=args.dtype, iteration=args.ckpt_step, adapter=args.adapter, **typed
    )  # fmt: skip
    if model.tokenizer is None:
        raise ConfigError(f"--load {args.load}: the checkpoint has no tokenizer; text needs one. {NAME_TOKENIZER}")
    return model
