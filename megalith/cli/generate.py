"""megalith generate: text out of a trained model, to the terminal as it is written, or into a file."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from megalith.checkpoint.formats.sources import is_url
from megalith.cli.checkpoint_convert import ORDERS
from megalith.common.encodings import conversion, reason
from megalith.common.errors import CheckpointError, ConfigError, DataError, problem
from megalith.common.files import write_text
from megalith.common.outputs import writing
from megalith.common.pointers import refuse_pointer
from megalith.config.flags.text import fail, flag
from megalith.config.flags.values import fields

TOKENIZER = {
    "tokenizer_type": "TYPE",
    "vocab_file": "FILE",
    "merge_file": "FILE",
    "tokenizer_model": "PATH",
}  # instead of a folder
SHOWN = ("num_attention_heads", "vocab_size", "position_embedding_type")  # what files lack most often

GIVE = "Name its folder with --tokenizer, or its files: --vocab-file FILE --merge-file FILE of GPT-2, --tokenizer-model FILE"
EXAMPLE = """\
examples:
  megalith generate --load runs/demo/run --prompt 'def ' --max-new-tokens 100 --temperature 0.8 --top-k 40
  megalith generate --load runs/demo/run --prompt-file prompts.txt --num-samples 4 --seed 1 --out-file texts.jsonl
  echo 'Once upon a time' | megalith generate --load runs/demo/run

A prompt file holds one prompt a line, or JSON strings or objects with "prompt" where its name ends in .jsonl. Standard input, where
it is not a terminal, is one prompt. Without any prompt, texts start from the end-of-document token.
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
    lacking = parser.add_argument_group(
        "what files of another format do not say (every flag of the model that `pretrain` has is known)"
    )
    lacking.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder of tokenizer files (default: those that the checkpoint has)"
    )
    for name, metavar in TOKENIZER.items():
        help = str(fields()[name].metadata["help"])
        lacking.add_argument(
            flag(name), *fields()[name].metadata["flags"], metavar=metavar, help=f"as in `megalith pretrain`: {help}"
        )
    for each in ORDERS:
        lacking.add_argument(each.name, default=each.choices[0], choices=each.choices, help=each.help)
    for name in _model_fields():
        text = f"as in `megalith pretrain`: {fields()[name].metadata['help']}" if name in SHOWN else argparse.SUPPRESS
        few: dict[str, Any] = {list: {"nargs": "*"}, bool: {"nargs": "?", "const": "true"}}.get(fields()[name].kind, {})
        metavar = "N" if fields()[name].kind is int else "TEXT"
        lacking.add_argument(
            flag(name), default=argparse.SUPPRESS, metavar=metavar, help=text.replace("%", "%%"), **few
        )
    parser.set_defaults(handler=generate)


def _model_fields() -> list[str]:
    return [name for name, each in fields().items() if each.section == "model"]


def generate(args: argparse.Namespace) -> int:
    """Load, write, show; the exit status."""
    out, notice = args.out_file, functools.partial(print, file=sys.stderr, flush=True)
    inputs = [args.prompt_file] if args.prompt_file else []
    with (
        writing(out, inputs=inputs, overwrite=args.overwrite, flag="--out-file", notice=notice)
        if out
        else contextlib.nullcontext()
    ):
        return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    named = {name: getattr(args, name) for name in ("load", "tokenizer", "vocab_file", "merge_file")}
    absent = [name for name, path in named.items() if path and not is_url(path) and not pathlib.Path(path).exists()]
    texts = [problem(flag(name), named[name], "there is no such file or folder", "Correct the path") for name in absent]
    fail(texts, CheckpointError)
    prompts = read_prompts(args)
    drawn = (
        args.greedy
        or args.top_k
        or args.top_p
        or args.top_p_decay
        or args.stop
        or args.ignore_eod
        or args.temperature != 1.0
    )
    if args.beam_width is not None and drawn:
        raise ConfigError(
            f"--beam-width {args.beam_width} with --greedy, --temperature, --top-k, --top-p, --top-p-decay, --stop or --ignore-eod: beam "
            f"search draws nothing and ends at the end of document. Drop the one or the others."
        )
    from megalith.generation.load import load  # here, because it imports torch

    said = {name: getattr(args, name) for name in _model_fields() if hasattr(args, name)}
    said |= {name: getattr(args, name) for name in TOKENIZER}
    orders = {"qkv_layout": args.qkv_layout, "swiglu_order": args.swiglu_order, "replicas": args.replicas}
    model = load(
        args.load,
        device=args.device,
        dtype=args.dtype,
        iteration=args.ckpt_step,
        tokenizer=args.tokenizer,
        **orders,
        **said,
    )
    if model.tokenizer is None:
        raise ConfigError(f"--load {args.load}: the checkpoint has no tokenizer; text needs one. {GIVE}")
    made = _beams(model, prompts, args) if args.beam_width is not None else _samples(model, prompts, args)
    if args.out_file is not None:
        write_text(
            pathlib.Path(args.out_file), "".join(json.dumps(record(one), ensure_ascii=False) + "\n" for one in made)
        )
        print(f"{len(made)} texts -> {args.out_file}")
    return 0


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts of --prompt, of --prompt-file, or of standard input where something is piped in; None for none.

    Raises DataError with file and line for what cannot be read.
    """
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None:
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
        if text and not text.strip():
            print("megalith: standard input is blank: the text starts from the end-of-document token", file=sys.stderr)
        return [text.removesuffix("\n")] if text.strip() else None
    path = pathlib.Path("/dev/stdin" if args.prompt_file == "-" else args.prompt_file)
    refuse_pointer(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a form feed may be part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        cure = conversion([reason(error)]).rstrip(". ") if isinstance(error, UnicodeDecodeError) else "Check the path"
        raise DataError(
            problem("--prompt-file", str(path), f"it must be a readable UTF-8 file ({error})", cure)
        ) from None
    parse: Callable[[str, str], str] = _json_prompt if path.suffix.lower() == ".jsonl" else lambda line, _: line
    prompts = [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(problem("--prompt-file", str(path), "it holds no prompt", "Write one prompt a line"))
    if blank := [number for number, line in enumerate(lines[:-1], 1) if not line.strip()]:
        named = f"line{'s' * (len(blank) > 1)} {', '.join(map(str, blank[:10]))}{' and more' * (len(blank) > 10)}"
        cure = 'an empty prompt is "" in a .jsonl file'
        print(f"megalith: {path}: {len(blank)} blank ({named}), and so no prompt, left out; {cure}", file=sys.stderr)
    return prompts


def _json_prompt(line: str, where: str) -> str:
    from megalith.common.json_lines import HALF, parse  # here, because it imports orjson

    try:
        value = parse(line)
    except ValueError as error:
        raise DataError(problem(where, line[:60], f"it must be JSON ({error})", "Correct the line")) from None
    found = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise DataError(
            problem(where, line[:60], 'it must be a string or an object with a string "prompt"', "Correct the line")
        )
    if half := HALF.search(found):
        raise DataError(problem(where, line[:60], f"{half[0]!a} is half of a character", "Correct the line"))
    return found


def record(made: Any) -> dict[str, Any]:
    """A Completion as it stands in --out-file."""
    extra = {} if made.score is None else {"score": made.score}
    return {
        "prompt": made.prompt,
        "continuation": made.continuation,
        "tokens": len(made.ids),
        "finish": made.finish,
        **extra,
    }


def _samples(model: Any, prompts: list[str] | None, args: argparse.Namespace) -> list[Any]:
    from megalith.generation.generate import complete

    count = args.num_samples * len(prompts or [""])
    show = args.out_file is None
    streamed = show and (args.stream if args.stream is not None else count == 1)
    shown = [""] * count if model.config.decoder_layers else prompts or [""]  # an answer stands alone
    on_token = _Printer(shown, args.num_samples) if streamed else None
    made = complete(
        model, prompts, max_new_tokens=args.max_new_tokens, temperature=0.0 if args.greedy else args.temperature, top_k=args.top_k,
        top_p=args.top_p, top_p_decay=args.top_p_decay, top_p_bound=args.top_p_bound,
        seed=args.seed, num_samples=args.num_samples, stop=args.stop, stop_at_eod=not args.ignore_eod, on_token=on_token,
        batch_size=1 if streamed else args.batch_size,
    )  # fmt: skip
    if on_token is not None:
        on_token.close()
    elif show:
        _show([one.text for one in made])
    return made


def _beams(model: Any, prompts: list[str] | None, args: argparse.Namespace) -> list[Any]:
    from megalith.generation.beam import beam_search
    from megalith.generation.prompts import tokenized

    options = {
        "beam_width": args.beam_width,
        "max_new_tokens": args.max_new_tokens,
        "length_penalty": args.length_penalty,
    }
    found = [beam_search(model, one.prompt_ids, prompt=one.prompt, **options) for one in tokenized(model, prompts)]
    made = [one for beams in found for one in beams[: args.num_samples]]
    if args.out_file is None:
        _show([one.text for one in made])
    return made


def _show(texts: list[str]) -> None:
    for number, text in enumerate(texts):
        if number:
            print(_RULE)
        print(text)


_RULE = "-" * 40


class _Printer:
    """Writes texts to the terminal piece by piece, one after another; a prompt is shown before its first piece."""

    def __init__(self, prompts: list[str], each: int):
        self.prompts, self.each, self.row = prompts, each, -1

    def __call__(self, row: int, token: int, piece: str) -> None:
        if row != self.row:
            if self.row >= 0:
                print(f"\n{_RULE}")
            self.row = row
            print(self.prompts[row // self.each], end="")
        print(piece, end="", flush=True)

    def close(self) -> None:
        """End the last line."""
        print()
