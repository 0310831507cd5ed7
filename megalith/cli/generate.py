"""megalith generate: text out of a trained model, to the terminal as it is written, or into a file."""

from __future__ import annotations

import argparse
import contextlib
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
from megalith.config.flags.text import fail, flag
from megalith.config.flags.values import fields
from megalith.workflows.prompt_files import read_prompts
from megalith.workflows.text_output import StreamPrinter, print_texts, to_record

# Flags for a tokenizer's files, where no folder is named
TOKENIZER = {
    "tokenizer_type": "TYPE",
    "vocab_file": "FILE",
    "merge_file": "FILE",
    "tokenizer_model": "PATH",
}
# The processes that these leave hold replicas, which share the prompts.
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
# Fields of the model that files of other programs lack most often
MODEL_HELP = (
    "num_attention_heads",
    "vocab_size",
    "position_embedding_type",
)

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

A prompt file holds one prompt a line, or JSON strings or objects with "prompt" where its name ends in .jsonl. Standard
input, where it is not a terminal, is one prompt. Without any prompt, texts start from the end-of-document token.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "generate", help="text out of a trained model", description="Text out of a trained model.", epilog=EXAMPLE
    )
    parser.add_argument(
        "--load",
        required=True,
        metavar="PATH",
        help="a run's folder, a checkpoint, or weights of Hugging Face or Megatron",
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what the text begins with; may be given several times"
    )
    source.add_argument("--prompt-file", metavar="FILE", help="a file of prompts (- for standard input)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to write at most (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="below 1 likely tokens are likelier, above 1 less likely ones; 0: greedy (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest tokens (default: 0, all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.0,
        metavar="P",
        help="choose among the likeliest tokens of total probability P (default: 0, all)",
    )
    parser.add_argument(
        "--top-p-decay",
        type=float,
        default=0.0,
        metavar="D",
        help="P is multiplied by this after each token (default: 0, it stays)",
    )
    parser.add_argument(
        "--top-p-bound", type=float, default=0.0, metavar="P", help="where --top-p-decay ends (default: 0)"
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--beam-width", type=int, metavar="N", help="beam search with N beams instead of sampling")
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="beams are ranked by log-probability / length^X (default: 1)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--ignore-eod", action="store_true", help="write on after an end-of-document token")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="the same seed gives the same texts (default: another each time)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="texts worked on at one time (default: 32)"
    )
    parser.add_argument(
        "--dtype", default="float32", metavar="TYPE", help="float32, bfloat16 or float16 (default: float32)"
    )
    for name in LAYOUT:
        text = f"under torchrun: {fields()[name].metadata['help']} (default: 1)"
        parser.add_argument(flag(name), *fields()[name].metadata["flags"], type=int, metavar="N", help=text)
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or xpu (default: auto)")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show text as it is written (default: where there is one text)",
    )
    parser.add_argument(
        "--out-file", metavar="FILE", help="write the results there, a JSON object a line, instead of showing them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out-file if it exists")
    group = parser.add_argument_group(
        "what files of another format do not say (every flag of the model that `pretrain` has is known)"
    )
    group.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder of tokenizer files (default: those that the checkpoint has)"
    )
    for name, metavar in TOKENIZER.items():
        help = str(fields()[name].metadata["help"])
        group.add_argument(
            flag(name), *fields()[name].metadata["flags"], metavar=metavar, help=f"as in `megalith pretrain`: {help}"
        )
    for each in MEGATRON_FLAGS:
        group.add_argument(each.name, default=each.choices[0], choices=each.choices, help=each.help)
    for name in _model_fields():
        text = (
            f"as in `megalith pretrain`: {fields()[name].metadata['help']}" if name in MODEL_HELP else argparse.SUPPRESS
        )
        options: dict[str, Any] = {list: {"nargs": "*"}, bool: {"nargs": "?", "const": "true"}}.get(
            fields()[name].kind, {}
        )
        metavar = "N" if fields()[name].kind is int else "TEXT"
        group.add_argument(
            flag(name), default=argparse.SUPPRESS, metavar=metavar, help=text.replace("%", "%%"), **options
        )
    parser.set_defaults(handler=generate)


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
    named = {name: getattr(args, name) for name in ("load", "tokenizer", "vocab_file", "merge_file")}
    absent = [name for name, path in named.items() if path and not is_url(path) and not pathlib.Path(path).exists()]
    texts = [
        problem(flag(name), named[name], "must name a file or folder that exists", "Correct the path")
        for name in absent
    ]
    fail(texts, CheckpointError)
    prompts = read_prompts(args.prompt, args.prompt_file) if environment.rank() == 0 else None
    sampling = (
        args.greedy
        or args.top_k
        or args.top_p
        or args.top_p_decay
        or args.stop
        or args.ignore_eod
        or args.temperature != 1.0
    )
    if args.beam_width is not None and sampling:
        raise ConfigError(
            f"--beam-width {args.beam_width} cannot be combined with --greedy, --temperature, --top-k, --top-p, "
            "--top-p-decay, --stop or --ignore-eod: beam search draws nothing and ends at the end-of-document token. "
            "Leave out the one or the others."
        )
    import torch.distributed as dist  # here, because it takes long

    from megalith.checkpoint.ranks import Ranks
    from megalith.generation.load import load

    owns_group = not dist.is_initialized()

    typed = {name: getattr(args, name) for name in _model_fields() if hasattr(args, name)}
    typed |= {name: getattr(args, name) for name in TOKENIZER}
    if environment.world_size() > 1 or any(getattr(args, name) for name in LAYOUT):
        typed |= {name: getattr(args, name) or 1 for name in LAYOUT}
    megatron = {"qkv_layout": args.qkv_layout, "swiglu_order": args.swiglu_order, "replicas": args.replicas}
    model = load(
        args.load,
        device=args.device,
        dtype=args.dtype,
        iteration=args.ckpt_step,
        tokenizer=args.tokenizer,
        **megatron,
        **typed,
    )
    if model.tokenizer is None:
        raise ConfigError(f"--load {args.load}: the checkpoint has no tokenizer; text needs one. {NAME_TOKENIZER}")
    prompts = Ranks().on_rank_0(lambda: prompts)
    search = _beams if args.beam_width is not None else _samples
    completions = search(model, prompts, args)
    if model.runtime is not None and owns_group:
        dist.destroy_process_group()
    if args.out_file is not None and environment.rank() == 0:
        lines = [json.dumps(to_record(completion), ensure_ascii=False) + "\n" for completion in completions]
        write_text(pathlib.Path(args.out_file), "".join(lines))
        print(f"{len(completions)} texts -> {args.out_file}")
    return 0


def _samples(model: Any, prompts: list[str] | None, args: argparse.Namespace) -> list[Any]:
    from megalith.generation.generate import complete

    count = args.num_samples * len(prompts or [""])
    to_terminal = args.out_file is None
    streamed = to_terminal and (args.stream if args.stream is not None else count == 1)
    # Before the answer of an encoder-decoder its prompt is not printed.
    printed = [""] * count if model.config.decoder_layers else prompts or [""]
    on_token = StreamPrinter(printed, args.num_samples) if streamed and environment.rank() == 0 else None
    completions = complete(
        model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        top_p_decay=args.top_p_decay,
        top_p_bound=args.top_p_bound,
        seed=args.seed,
        num_samples=args.num_samples,
        stop=args.stop,
        stop_at_eod=not args.ignore_eod,
        on_token=on_token,
        batch_size=1 if streamed else args.batch_size,
    )
    if on_token is not None:
        on_token.close()
    elif to_terminal and not streamed and environment.rank() == 0:
        print_texts(completions)
    return completions


def _beams(model: Any, prompts: list[str] | None, args: argparse.Namespace) -> list[Any]:
    from megalith.generation.beam import beam_search
    from megalith.generation.prompts import tokenize_prompts

    options = {
        "beam_width": args.beam_width,
        "max_new_tokens": args.max_new_tokens,
        "length_penalty": args.length_penalty,
    }
    found = [
        beam_search(model, each.prompt_ids, prompt=each.prompt, **options) for each in tokenize_prompts(model, prompts)
    ]
    completions = [completion for beams in found for completion in beams[: args.num_samples]]
    if args.out_file is None and environment.rank() == 0:
        print_texts(completions)
    return completions
