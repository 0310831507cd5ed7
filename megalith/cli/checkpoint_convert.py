"""`megalith checkpoint import`, `export` and `reshape`: weights from other formats, to them, and between layouts of Megatron."""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import problem
from megalith.common.extras import lacking
from megalith.config.flags import flags
from megalith.config.flags.flags import VALUE, Flag
from megalith.config.flags.text import fail, flag
from megalith.config.flags.values import convert as typed
from megalith.config.flags.values import fields

IMPORT = """\
examples:
  megalith checkpoint import Llama-3-8B runs/llama                    # a Hugging Face folder
  megalith checkpoint import megatron/iter_0005000 runs/gpt --tokenizer gpt2-files --verify
  megalith checkpoint import megatron_lm_345m_v0.0.zip runs/345m --num-attention-heads 16 --vocab-file gpt2-vocab.json \\
      --merge-file gpt2-merges.txt                                    # the release of NVIDIA, which says neither heads nor words

SOURCE is a folder, a zip archive, or the URL of one. The format is recognised by itself. Flags of the model (--num-layers, ...) say
what the source does not say, or say it better; so do those of the tokenizer (--vocab-file, --merge-file, --tokenizer-model). Nothing
in the source is run: pickles are read without the classes they name.
"""
EXPORT = """\
examples:
  megalith checkpoint export runs/gpt gpt-hf --to huggingface --max-shard-size 2GB
  megalith checkpoint export runs/gpt gpt-megatron --to megatron --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
  megalith checkpoint export megatron/iter_0005000 gpt-hf --to huggingface --dtype bfloat16

SOURCE may be in any format that `import` reads.
"""
RESHAPE = """\
examples:
  megalith checkpoint reshape megatron megatron-tp4 --target-tensor-parallel-size 4 --target-pipeline-parallel-size 1
  megalith checkpoint reshape megatron megatron-pp8 --target-pipeline-parallel-size 8 --dtype bfloat16 --with-optimizer

From one layout of Megatron to another in one step, tensor by tensor. Checkpoints of megalith need none: any layout loads them.
"""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"} | {
    name: name for name in ("float32", "bfloat16", "float16")
}


def _renamed(old: str, new: str, sets: Mapping[str, Any], nargs: int | str = 1) -> Flag:
    """A spelling of transformers' and Megatron's converters."""
    return Flag(old, dict(sets), nargs, notice=f"{old} is read as {new}")


ORDERS = (  # how Megatron's files are read; `generate` asks for them too
    Flag("--qkv-layout", {"qkv_layout": VALUE}, choices=("auto", "grouped", "thirds", "interleaved"),
         help="order of rows of fused q, k, v in Megatron's files (default: auto, by the file's version)"),
    Flag("--swiglu-order", {"swiglu_order": VALUE}, choices=("auto", "gate-first", "gate-second"),
         help="which half of a fused gated MLP is the gate (default: auto)"),
    Flag("--replicas", {"replicas": VALUE}, choices=("equal", "average"),
         help="copies of one parameter that Megatron's ranks keep must be equal, or are averaged (default: equal)"),
)  # fmt: skip
COMMON = (
    Flag("--from", {"from": VALUE}, help="format of the source: huggingface, megatron, ... (default: the one recognised)"),
    Flag("--ckpt-step", {"iteration": VALUE}, help="iteration to take of several (default: the latest)"),
    Flag("--dtype", {"dtype": VALUE}, choices=tuple(DTYPES), help="number format of the weights written (default: the source's)"),
    *ORDERS,
    Flag("--tokenizer", {"tokenizer": VALUE}, help="folder with tokenizer files that go along (default: the source's)"),
    Flag("--with-optimizer", {"with_optimizer": True}, 0, help="the optimizer's state too, where both formats can hold it"),
    Flag("--overwrite", {"overwrite": True}, 0, help="replace what an earlier conversion wrote into FOLDER"),
    Flag("--sha256", {"sha256": VALUE}, help="checksum that a downloaded source must have"),
    Flag("--verify", {"verify": True}, 0, help="compare logits with transformers' model (needs transformers)"),
    Flag("--print-structure", {"print_structure": True}, 0, help="print names, shapes and dtypes of the tensors"),
    _renamed("--load-path", "SOURCE", {"source": VALUE}),
    _renamed("--load-dir", "SOURCE", {"source": VALUE}),
    _renamed("--save-path", "FOLDER", {"folder": VALUE}),
    _renamed("--save-dir", "FOLDER", {"folder": VALUE}),
    Flag("--tokenizer-name", {"tokenizer_name": VALUE}),
    _renamed("--print-checkpoint-structure", "--print-structure", {"print_structure": True}, 0),
    _renamed("--target-params-dtype", "--dtype", {"dtype": VALUE}),
    Flag("--megatron-path", {}, notice="--megatron-path is not needed: Megatron's files are read without its code"),
)  # fmt: skip
TARGET = (
    Flag(
        "--data-parallel-size",
        {"data_parallel_size": VALUE},
        help="parts of Megatron's distributed optimizer (default: 1)",
    ),
    _renamed(
        "--target-tensor-model-parallel-size", "--tensor-model-parallel-size", {"tensor_model_parallel_size": VALUE}
    ),
    _renamed("--target-tensor-parallel-size", "--tensor-model-parallel-size", {"tensor_model_parallel_size": VALUE}),
    _renamed(
        "--target-pipeline-model-parallel-size",
        "--pipeline-model-parallel-size",
        {"pipeline_model_parallel_size": VALUE},
    ),
    _renamed(
        "--target-pipeline-parallel-size", "--pipeline-model-parallel-size", {"pipeline_model_parallel_size": VALUE}
    ),
    _renamed("--target-data-parallel-size", "--data-parallel-size", {"data_parallel_size": VALUE}),
    _renamed("--true-vocab-size", "--vocab-size", {"vocab_size": VALUE}),
)
OWN = {
    "import": COMMON,
    "reshape": (  # the rest are words of Megatron's checkpoint_util.py
        *COMMON,
        *TARGET,
        Flag("--model-type", {}, notice="--model-type is not needed: the parameters tell it"),
        Flag("--loader", {}, notice="--loader is not needed: the format is recognised by itself (--from names one)"),
        Flag("--saver", {}, notice="--saver is not needed: what is written are Megatron's directories"),
        Flag(
            "--max-queue-size",
            {},
            notice="--max-queue-size is not needed: one process reads and writes, tensor by tensor",
        ),
        Flag("--no-checking", {}, 0, notice="--no-checking is not needed: names and shapes are always checked"),
    ),
    "export": (
        Flag("--to", {"to": VALUE}, help="format to write: huggingface, megatron, ..."),
        Flag(
            "--max-shard-size", {"max_shard_size": VALUE}, help="bytes of one file at most: 200MB, 5GB (default: 5GB)"
        ),
        Flag("--bin", {"safetensors": False}, 0, help="pytorch_model.bin instead of safetensors"),
        Flag(
            "--architecture",
            {"architecture": VALUE},
            help="Hugging Face family: gpt2, llama, ... (default: one that has this form)",
        ),
        *COMMON,
        *TARGET,
        _renamed("--convert-checkpoint-from-megatron-to-transformers", "--to huggingface", {"to": "huggingface"}, 0),
    ),
}
NUMBERS = ("data_parallel_size", "iteration")
TOLD = (
    "qkv_layout",
    "swiglu_order",
    "replicas",
    "safetensors",
    "architecture",
    "with_optimizer",
)  # of Options, as they were typed
LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "use_distributed_optimizer",
    "make_vocab_size_divisible_by",
)  # fmt: skip


def register(verbs: Any) -> None:
    """Add `import`, `export` and `reshape` to the verbs of `megalith checkpoint`."""
    about = {
        "import": "weights of another format become a checkpoint",
        "export": "a checkpoint in another format",
        "reshape": "a Megatron checkpoint in another layout",
    }
    folders = {
        "import": "a folder of checkpoints, as --load takes it",
        "export": "in the format of --to",
        "reshape": "Megatron's",
    }
    for verb, epilog in (("import", IMPORT), ("export", EXPORT), ("reshape", RESHAPE)):
        usage = f"megalith checkpoint {verb} SOURCE FOLDER [--FLAG VALUE ...]"
        parser = verbs.add_parser(verb, help=about[verb], usage=usage, epilog=epilog)
        parser.add_argument("source", metavar="SOURCE", help="what is read: a folder, a zip archive, or the URL of one")
        parser.add_argument("folder", metavar="FOLDER", help=f"what is written, a new folder: {folders[verb]}")
        flags.add_own_help(parser, [each for each in OWN[verb] if each.help])
        parser.set_defaults(handler=functools.partial(run, verb), reads=functools.partial(flags.read, own=OWN[verb]))


def run(verb: str, args: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    values, problems = dict(args.reading.values), [each.text for each in args.reading.problems]
    words = [values.pop(name) for name in ("source", "folder") if name in values] + args.reading.words
    if len(words) != 2:
        cure = f"Write megalith checkpoint {verb} SOURCE FOLDER"
        problems.append(problem("paths", words, "it takes two, where to read and where to write", cure))
    to = values.pop("to", {"import": "megalith", "reshape": "megatron"}.get(verb))
    if to is None and any(word in LAYOUT or word == "data_parallel_size" for word in values):
        to = "megatron"  # transformers' converter goes there unless told otherwise
    if to is None:
        problems.append(problem("--to", None, "an export has a format", "Write --to huggingface, or --to megatron"))
    told = {
        name: values.pop(name)
        for name in ("from", "overwrite", "sha256", "verify", "print_structure")
        if name in values
    }
    options = _options(values, verb, problems)
    if told.get("verify") and (fault := lacking("transformers", "--verify")):
        problems.append(fault)
    fail(problems)
    all_written = to == "megalith" or (to == "megatron" and bool(options.get("with_optimizer")))
    for line in args.reading.notices:
        print(line)
    for name, plain in (("use_distributed_optimizer", False), ("data_parallel_size", 1)):
        if not all_written and options.get(name, plain) != plain:
            print(f"{flag(name)} has no effect without --with-optimizer" + " --to megatron" * (to != "megatron"))
    from megalith.checkpoint.formats import Options, sources
    from megalith.workflows import conversion  # here, because it imports torch

    source, folder = sources.local(words[0], sha256=told.get("sha256")), pathlib.Path(words[1])
    if verb == "reshape":
        conversion.check_reshape(source, told.get("from"))
    weights = conversion.convert(
        source,
        folder,
        to=to,
        format=told.get("from"),
        options=Options(**options),
        overwrite="overwrite" in told,
        notice=print,
    )
    written = {name: lazy for name, lazy in weights.tensors.items() if all_written or name.startswith("model/")}
    if told.get("print_structure"):
        for name, lazy in written.items():
            print(f"{name:<60} {list(lazy.shape)} {str(lazy.dtype).removeprefix('torch.')}")
    for line in weights.notes:
        print(line)
    print(f"{len(written)} tensors -> {folder}")
    if told.get("verify"):
        worst = conversion.verify(source, folder, Options(**options))
        print(f"verified: the logits differ from those of transformers by at most {worst:.1e} of the largest")
    return 0


def _options(values: dict[str, Any], verb: str, problems: list[str]) -> dict[str, Any]:
    """Fields of Options from raw values; what is left are fields of the config."""
    found = {name: values.pop(name) for name in TOLD if name in values}
    for each in NUMBERS:
        if each in values:
            found[each] = _number({"iteration": "--ckpt-step"}.get(each, flag(each)), values.pop(each), problems)
    if "dtype" in values:
        found["dtype"] = DTYPES.get(raw := values.pop("dtype"))
        if found["dtype"] is None:
            problems.append(problem("--dtype", raw, f"it is one of {', '.join(DTYPES)}", "Write --dtype bfloat16"))
    if "max_shard_size" in values:
        found["max_shard_size"] = _bytes(values.pop("max_shard_size"), problems)
    name = values.pop("tokenizer_name", None)
    if name is not None and pathlib.Path(name).is_dir():
        values["tokenizer"] = name
    elif name is not None:
        print(
            f"--tokenizer-name {name} is no folder, and nothing is downloaded by name: add tokenizer files with --tokenizer FOLDER"
        )
    if "tokenizer" in values:
        found["tokenizer"] = pathlib.Path(values.pop("tokenizer"))
        if not found["tokenizer"].is_dir():
            rule = "it is a folder with tokenizer.json, or vocab.json and merges.txt; nothing is downloaded by name"
            problems.append(problem("--tokenizer", str(found["tokenizer"]), rule, "Name a folder on this machine"))
    overrides = {}
    for field, raw in values.items():
        value, trouble = typed(fields()[field], raw, flag(field))
        if trouble:
            problems.append(trouble.text)
        elif verb != "import" and field in LAYOUT:
            found[field] = value
        else:
            overrides[field] = value
    return {**found, "overrides": overrides}


def _number(name: str, text: str, problems: list[str]) -> int | None:
    if re.fullmatch(r"\d+", text):
        return int(text)
    problems.append(problem(name, text, "it is a whole number", f"Write {name} 1"))
    return None


def _bytes(text: str, problems: list[str]) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.upper())
    if match and float(match[1]) > 0:
        return int(float(match[1]) * UNITS[match[2] or ""])
    problems.append(
        problem("--max-shard-size", text, "it is a size such as 200MB, 5GB or 2GiB", "Write --max-shard-size 5GB")
    )
    return None
