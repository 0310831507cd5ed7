"""megalith generate: text out of a trained model, to the terminal as it is written, or into a file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

from megalith.cli.checkpoint_convert import MEGATRON_FLAGS
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.files import write_text
from megalith.common.orphans import ends_with_launcher
from megalith.common.outputs import writing
from megalith.common.urls import is_url
from megalith.config import environment
from megalith.config.flags.text import Words, fail, flag, value_text
from megalith.config.flags.values import fields
from megalith.generation.params import GenerationParams
from megalith.workflows.prompt_files import read_prompts
from megalith.workflows.text_output import StreamPrinter, print_texts, to_record

# Flags for a tokenizer's files, where no folder is named
TOKENIZER = {"tokenizer_type": "TYPE", "vocab_file": "FILE", "merge_file": "FILE", "tokenizer_model": "PATH"}
# The processes that these leave hold replicas, which share the prompts.
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
# Fields of the model that files of other programs lack most often
MODEL_HELP = ("num_attention_heads", "vocab_size", "position_embedding_type")
NAME_TOKENIZER = (
    "Name its folder with --tokenizer, or its files: --vocab-file FILE --merge-file FILE of GPT-2, "
    "--tokenizer-model FILE"
)
EXAMPLE = """\
examples:
  megalith generate --load runs/demo/run --prompt 'def ' --max-new-tokens 100 --temperature 0.8 --top-k 40
  megalith generate --load runs/demo/run --prompt-file prompts.txt --num-samples 4 --seed 1 --out-file texts.jsonl
  echo 'Once upon a time' | megalith generate --load runs/demo/run
  torchrun --nproc-per-node 4 -m megalith generate --load Llama-3-8B --tensor-model-parallel-size 2 --prompt 'Once'

A prompt file holds one prompt a line. Where its name ends in .jsonl, a line is a JSON string, or an object with
"prompt" and options of this prompt alone: {"prompt": "Q: why?", "temperature": 0.2, "stop": ["\\n"]}. Standard input,
where it is not a terminal, is one prompt. Without any prompt, texts start from the end-of-document token, or from BOS
where the tokenizer puts it before every text.
"""


def bias(text: str) -> tuple[int, float]:
    """A token and its bias: 50256=-inf."""
    token, _, value = text.rpartition("=")
    return int(token), float(value)


ARGUMENTS: dict[str, dict[str, Any]] = {  # how the flag of an option is read, by the type of its field
    "float": {"type": float, "metavar": "X"},
    "int": {"type": int, "metavar": "N"},
    "int | None": {"type": int, "metavar": "N"},
    "bool": {"action": "store_true"},
    "tuple[str, ...]": {"action": "append", "metavar": "TEXT"},
    "tuple[int, ...]": {"type": int, "nargs": "+", "metavar": "N"},
    "Mapping[int, float]": {"type": bias, "nargs": "+", "metavar": "TOKEN=X"},
}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "generate", help="text out of a trained model", description="Text out of a trained model.", epilog=EXAMPLE
    )
    add = parser.add_argument
    add(
        "--load",
        required=True,
        metavar="PATH",
        help="a run's folder, a checkpoint, or weights of Hugging Face or Megatron",
    )
    add("--adapter", metavar="PATH", help="low-rank adapters that were trained on it: a LoRA run or a PEFT folder")
    add("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    add("--dtype", default="float32", metavar="TYPE", help="float32, bfloat16 or float16")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or xpu")
    for name in LAYOUT:
        help = f"under torchrun: {fields()[name].metadata['help']} (default: 1)"
        add(flag(name), *fields()[name].metadata["flags"], type=int, metavar="N", help=help)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what the text begins with; may be given several times"
    )
    source.add_argument("--prompt-file", metavar="FILE", help="a file of prompts (- for standard input)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show text as it is written (default: where there is one text)",
    )
    add("--out-file", metavar="FILE", help="write the results there, a JSON object a line, instead of showing them")
    add("--overwrite", action="store_true", help="replace the file of --out-file if it exists")
    add("--batch-size", type=int, default=32, metavar="N", help="texts worked on at one time")
    add(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="texts do not depend on the batch; without, one text alone is a third faster (default: on)",
    )
    add("--compile", action="store_true", help="decode by a compiled graph; compiling takes a minute, once")
    _add_options(parser.add_argument_group("how texts are written"))
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
    for name in _model_fields():
        field = fields()[name]
        help = f"as in `megalith pretrain`: {field.metadata['help']}".replace("%", "%%")
        options: dict[str, Any] = {list: {"nargs": "*"}, bool: {"nargs": "?", "const": "true"}}.get(field.kind, {})
        metavar = "N" if field.kind is int else "TEXT"
        help = help if name in MODEL_HELP else argparse.SUPPRESS
        add(flag(name), default=argparse.SUPPRESS, metavar=metavar, help=help, **options)
    parser.set_defaults(handler=generate)


def _add_options(group: argparse._ArgumentGroup) -> None:
    """A flag for each field of GenerationParams, and two short ones."""
    default = GenerationParams()
    for each in dataclasses.fields(GenerationParams):
        value, help = getattr(default, each.name), str(each.metadata["help"]).replace("%", "%%")
        how = {"action": argparse.BooleanOptionalAction} if value is True else ARGUMENTS[str(each.type)]
        if value not in (None, False, (), {}):
            help += f" (default: {'on' if value is True else value_text(value)})"
        if each.type == "tuple[str, ...]":
            help += "; may be given several times"
        group.add_argument(flag(each.name), default=argparse.SUPPRESS, help=help, **how)
    group.add_argument("--greedy", action="store_true", default=argparse.SUPPRESS, help="as --temperature 0")
    group.add_argument(
        "--ignore-eod", dest="stop_at_eod", action="store_false", default=argparse.SUPPRESS, help="as --no-stop-at-eod"
    )


def _model_fields() -> list[str]:
    return [name for name, each in fields().items() if each.section == "model"]


def generate(args: argparse.Namespace) -> int:
    """Load a model, write texts, and print or store them; the exit status."""
    out, notice = args.out_file, functools.partial(print, file=sys.stderr, flush=True)
    inputs = [args.prompt_file] if args.prompt_file else []
    with (
        ends_with_launcher(),
        writing(out, inputs=inputs, overwrite=args.overwrite, flag="--out-file", notice=notice)
        if out and environment.rank() == 0
        else contextlib.nullcontext(),
    ):
        return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    named = {name: getattr(args, name) for name in ("load", "adapter", "tokenizer", "vocab_file", "merge_file")}
    absent = [name for name, path in named.items() if path and not is_url(path) and not pathlib.Path(path).exists()]
    texts = [
        problem(flag(name), named[name], "must name a file or folder that exists", "Correct the path")
        for name in absent
    ]
    fail(texts, CheckpointError)
    options = [each.name for each in dataclasses.fields(GenerationParams)]
    given = {name: value for name, value in vars(args).items() if name in ("greedy", *options)}
    common, is_main_process = GenerationParams().replace(**given), environment.rank() == 0
    # One process reads for all, as it may be from standard input.
    read = read_prompts(args.prompt, args.prompt_file, common) if is_main_process else ([], [])
    if args.out_file is None and any(each.logprobs or each.top_logprobs or each.prompt_logprobs for each in read[1]):
        rule, cure = "must be given with log-probabilities, because they are written there", "Name a file"
        raise ConfigError(problem("--out-file", Words("nothing"), rule, cure))
    import torch.distributed as dist  # here, because these import torch

    from megalith.checkpoint.ranks import Ranks
    from megalith.generation.generate import complete
    from megalith.generation.load import load

    owns_group = not dist.is_initialized()
    typed = {name: getattr(args, name) for name in _model_fields() if hasattr(args, name)}
    typed |= {name: getattr(args, name) for name in (*TOKENIZER, "tokenizer", "qkv_layout", "swiglu_order", "replicas")}
    if environment.world_size() > 1 or any(getattr(args, name) for name in LAYOUT):
        typed |= {name: getattr(args, name) or 1 for name in LAYOUT}
    model = load(
        args.load, device=args.device, dtype=args.dtype, iteration=args.ckpt_step, adapter=args.adapter, **typed
    )
    if model.tokenizer is None:
        raise ConfigError(f"--load {args.load}: the checkpoint has no tokenizer; text needs one. {NAME_TOKENIZER}")
    prompts, params = Ranks().on_rank_0(lambda: read)
    samples = [
        (prompt if each.echo and not model.config.decoder_layers else "", each)
        for prompt, each in zip(prompts, params)
        for _ in range(each.num_samples)
    ]
    streamed, printer = args.stream, None
    if streamed is None:
        streamed = len(samples) == 1 and samples[0][1].beam_width is None
    if streamed and args.out_file is None and all(each.max_new_tokens for _, each in samples):
        printer = StreamPrinter([prompt for prompt, _ in samples])
    completions = complete(
        model, prompts, params=params, on_token=printer if is_main_process else None,
        batch_size=1 if printer else args.batch_size, batch_invariant=args.batch_invariant, compile=args.compile,
    )  # fmt: skip
    if model.runtime is not None and owns_group:
        dist.destroy_process_group()
    if not is_main_process:
        return 0
    if args.out_file is not None:
        lines = [json.dumps(to_record(completion), ensure_ascii=False) + "\n" for completion in completions]
        write_text(pathlib.Path(args.out_file), "".join(lines))
        print(f"{len(completions)} texts -> {args.out_file}")
    elif printer is not None:
        printer.close()
    else:
        print_texts(completions)
    return 0
