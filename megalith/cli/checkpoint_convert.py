"""`megalith checkpoint import`, `export` and `reshape`: the flags, and the calls that they become."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from megalith.config.flags import flags
from megalith.config.flags.flags import VALUE, Flag
from megalith.workflows import conversion_request
from megalith.workflows.conversion_request import DTYPES

IMPORT = """\
examples:
  megalith checkpoint import Llama-3-8B runs/llama                    # a Hugging Face folder
  megalith checkpoint import megatron/iter_0005000 runs/gpt --tokenizer gpt2-files --verify
  megalith checkpoint import megatron_lm_345m_v0.0.zip runs/345m --num-attention-heads 16 \\
      --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt       # NVIDIA's release states neither of these

SOURCE is a folder, a zip archive, or the URL of one. Its format is recognised. Flags of the model (--num-layers, ...)
and of the tokenizer (--vocab-file, --merge-file, --tokenizer-model) add what the source does not state, or replace what
it states. Nothing in the source is run: pickles are read without the classes they name.
"""
EXPORT = """\
examples:
  megalith checkpoint export runs/gpt gpt-hf --to huggingface --max-shard-size 2GB
  megalith checkpoint export runs/gpt gpt-megatron --to megatron --tensor-model-parallel-size 2 \\
      --pipeline-model-parallel-size 2
  megalith checkpoint export runs/lora adapters --to peft             # of a run with --lora-rank; without: merged
  megalith checkpoint export megatron/iter_0005000 gpt-hf --to huggingface --dtype bfloat16

SOURCE may be in any format that `import` reads.
"""
RESHAPE = """\
examples:
  megalith checkpoint reshape megatron megatron-tp4 --target-tensor-parallel-size 4 --target-pipeline-parallel-size 1
  megalith checkpoint reshape megatron megatron-pp8 --target-pipeline-parallel-size 8 --dtype bfloat16 --with-optimizer

From one layout of Megatron to another in one step, tensor by tensor. Checkpoints of megalith need no reshaping: any
layout loads them.
"""


def _renamed_flag(old: str, new: str, sets: Mapping[str, Any], nargs: int | str = 1) -> Flag:
    """A flag of transformers' or Megatron's converters, accepted under its old name."""
    return Flag(old, dict(sets), nargs, notice=f"{old} is read as {new}")


MEGATRON_FLAGS = (  # how Megatron's files are read; `generate` has them too
    Flag("--qkv-layout", {"qkv_layout": VALUE}, choices=("auto", "grouped", "thirds", "interleaved"),
         help="order of rows of fused q, k, v in Megatron's files (default: auto, by the file's version)"),
    Flag("--swiglu-order", {"swiglu_order": VALUE}, choices=("auto", "gate-first", "gate-second"),
         help="which half of a fused gated MLP is the gate (default: auto)"),
    Flag("--replicas", {"replicas": VALUE}, choices=("equal", "average"),
         help="copies of one parameter that Megatron's ranks hold must be equal, or are averaged (default: equal)"),
)  # fmt: skip
COMMON = (
    Flag("--from", {"from": VALUE},
         help="format of the source: huggingface, megatron, ... (default: the one recognised)"),
    Flag("--ckpt-step", {"iteration": VALUE}, help="iteration to take of several (default: the latest)"),
    Flag("--dtype", {"dtype": VALUE}, choices=tuple(DTYPES),
         help="number format of the weights written (default: the source's)"),
    *MEGATRON_FLAGS,
    Flag("--adapter", {"adapter": VALUE},
         help="low-rank adapters of SOURCE, a LoRA run or a PEFT folder: merged into its weights (--to peft: written)"),
    Flag("--tokenizer", {"tokenizer": VALUE}, help="folder of tokenizer files to copy along (default: the source's)"),
    Flag("--with-optimizer", {"with_optimizer": True}, 0,
         help="convert the optimizer's state too, where both formats can hold it"),
    Flag("--overwrite", {"overwrite": True}, 0, help="replace what an earlier conversion wrote into FOLDER"),
    Flag("--sha256", {"sha256": VALUE}, help="checksum that a downloaded source must have"),
    Flag("--verify", {"verify": True}, 0, help="compare logits with transformers' model (needs transformers)"),
    Flag("--print-structure", {"print_structure": True}, 0, help="print names, shapes and dtypes of the tensors"),
    _renamed_flag("--load-path", "SOURCE", {"source": VALUE}),
    _renamed_flag("--load-dir", "SOURCE", {"source": VALUE}),
    _renamed_flag("--save-path", "FOLDER", {"folder": VALUE}),
    _renamed_flag("--save-dir", "FOLDER", {"folder": VALUE}),
    Flag("--tokenizer-name", {"tokenizer_name": VALUE}),
    _renamed_flag("--print-checkpoint-structure", "--print-structure", {"print_structure": True}, 0),
    _renamed_flag("--target-params-dtype", "--dtype", {"dtype": VALUE}),
    Flag("--megatron-path", {}, notice="--megatron-path is not needed: Megatron's files are read without its code"),
)  # fmt: skip
TARGET = (
    Flag(
        "--data-parallel-size",
        {"data_parallel_size": VALUE},
        help="number of shards of Megatron's distributed optimizer (default: 1)",
    ),
    _renamed_flag(
        "--target-tensor-model-parallel-size", "--tensor-model-parallel-size", {"tensor_model_parallel_size": VALUE}
    ),
    _renamed_flag(
        "--target-tensor-parallel-size", "--tensor-model-parallel-size", {"tensor_model_parallel_size": VALUE}
    ),
    _renamed_flag(
        "--target-pipeline-model-parallel-size",
        "--pipeline-model-parallel-size",
        {"pipeline_model_parallel_size": VALUE},
    ),
    _renamed_flag(
        "--target-pipeline-parallel-size", "--pipeline-model-parallel-size", {"pipeline_model_parallel_size": VALUE}
    ),
    _renamed_flag("--target-data-parallel-size", "--data-parallel-size", {"data_parallel_size": VALUE}),
    _renamed_flag("--true-vocab-size", "--vocab-size", {"vocab_size": VALUE}),
)
FLAGS = {
    "import": COMMON,
    "reshape": (  # the rest are flags of Megatron's checkpoint_util.py
        *COMMON,
        *TARGET,
        Flag("--model-type", {}, notice="--model-type is not needed: the parameters show it"),
        Flag("--loader", {}, notice="--loader is not needed: the format is recognised (--from names one)"),
        Flag("--saver", {}, notice="--saver is not needed: Megatron's directories are written"),
        Flag(
            "--max-queue-size",
            {},
            notice="--max-queue-size is not needed: one process reads and writes, tensor by tensor",
        ),
        Flag("--no-checking", {}, 0, notice="--no-checking is not needed: names and shapes are always checked"),
    ),
    "export": (
        Flag("--to", {"to": VALUE}, help="format to write: huggingface, megatron, peft (adapters alone), ..."),
        Flag("--max-shard-size", {"max_shard_size": VALUE}, help="largest size of one file: 200MB, 5GB (default: 5GB)"),
        Flag("--bin", {"safetensors": False}, 0, help="pytorch_model.bin instead of safetensors"),
        Flag(
            "--architecture",
            {"architecture": VALUE},
            help="Hugging Face family: gpt2, llama, ... (default: one that fits the model)",
        ),
        *COMMON,
        *TARGET,
        _renamed_flag(
            "--convert-checkpoint-from-megatron-to-transformers", "--to huggingface", {"to": "huggingface"}, 0
        ),
    ),
}


def register(verbs: Any) -> None:
    """Add `import`, `export` and `reshape` to the verbs of `megalith checkpoint`."""
    about = {
        "import": "convert weights of another format into a checkpoint",
        "export": "convert a checkpoint into another format",
        "reshape": "convert a Megatron checkpoint to another layout",
    }
    folders = {
        "import": "a folder of checkpoints, as --load takes it",
        "export": "in the format of --to",
        "reshape": "Megatron's directories",
    }
    for verb, epilog in (("import", IMPORT), ("export", EXPORT), ("reshape", RESHAPE)):
        usage = f"megalith checkpoint {verb} SOURCE FOLDER [--FLAG VALUE ...]"
        parser = verbs.add_parser(verb, help=about[verb], usage=usage, epilog=epilog)
        parser.add_argument("source", metavar="SOURCE", help="what to read: a folder, a zip archive, or the URL of one")
        parser.add_argument("folder", metavar="FOLDER", help=f"new folder to write: {folders[verb]}")
        flags.add_command_help(parser, [flag for flag in FLAGS[verb] if flag.help])
        parser.set_defaults(
            handler=functools.partial(run, verb), reads=functools.partial(flags.read, command_flags=FLAGS[verb])
        )


def run(verb: str, args: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    reading = args.reading
    problems = [each.text for each in reading.problems]
    request = conversion_request.read(verb, reading.values, reading.words, problems, notice=print)
    for line in reading.notices:
        print(line)
    from megalith.workflows.conversion import run_request  # here, because it imports torch

    run_request(request, notice=print)
    return 0
