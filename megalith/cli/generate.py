"""megalith generate: text out of a trained model, to the terminal as it is written, or into a file."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pathlib
import sys

from megalith.cli.flags.load import WHAT_TO_LOAD, add_format_flags, add_load_flags, check_paths, load_model
from megalith.cli.flags.options import add_sampling_flags, given_sampling
from megalith.cli.flags.retriever import add_retriever_flags, set_retriever
from megalith.common.errors import ConfigError, problem
from megalith.common.files import write_text
from megalith.common.orphans import ends_with_launcher
from megalith.common.outputs import writing
from megalith.config import environment
from megalith.config.flags.text import Words
from megalith.generation.params import GenerationParams
from megalith.workflows.prompt_files import read_prompts
from megalith.workflows.text_output import StreamPrinter, print_texts, to_record

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


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "generate", help="text out of a trained model", description="Text out of a trained model.", epilog=EXAMPLE
    )
    add = parser.add_argument
    add("--load", required=True, metavar="PATH", help=WHAT_TO_LOAD)
    add_load_flags(parser)
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
    add_retriever_flags(parser)
    add_sampling_flags(parser.add_argument_group("how texts are written"))
    add_format_flags(parser)
    parser.set_defaults(handler=generate)


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
    check_paths(args)
    common, is_main_process = GenerationParams().replace(**given_sampling(args)), environment.rank() == 0
    # One process reads for all, as it may be from standard input.
    read = read_prompts(args.prompt, args.prompt_file, common) if is_main_process else ([], [])
    if args.out_file is None and any(each.logprobs or each.top_logprobs or each.prompt_logprobs for each in read[1]):
        rule, cure = "must be given with log-probabilities, because they are written there", "Name a file"
        raise ConfigError(problem("--out-file", Words("nothing"), rule, cure))
    from megalith.checkpoint.ranks import Ranks  # here, because these import torch
    from megalith.generation.generate import complete
    from megalith.runtime.build import process_group

    with process_group():
        model = load_model(args)
        set_retriever(model, args)
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
