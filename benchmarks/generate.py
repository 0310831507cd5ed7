"""Decoding speed against transformers' `generate`: the same weights and prompts, in one process, in turns.

    python benchmarks/generate.py --out benchmarks/results/generate.txt    CPU: 6 layers, hidden 384, vocabulary 50304
    python benchmarks/generate.py --profile                                where a decoding step's time goes, on a CPU
    python benchmarks/generate.py --device cuda --dtype bfloat16 --num-layers 24 --hidden-size 1024 --heads 16 --compile

tokens/s counts new tokens and includes the reading of the prompts. transformers decodes with both of its caches, and
the faster counts (--compile: its static cache with its compiled step, ours with ours). Our engine is made once for each
number of rows, as a server makes it. "limit": every weight matrix times one token of each row, as many times as there
are new tokens, and nothing else. All cases of a number of rows take turns in --rounds rounds; medians are compared.
"of greedy": a sampled case against ours greedy. GB/s: the bytes of the weight matrices for each new token of one row;
of a copy, the bytes that it reads and those that it writes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
import transformers
from torch import nn
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.decode_profile import STEPS, TOKENS, profile_decoding
from megalith.config.sections.model import ModelConfig
from megalith.generation.engine import Engine, Request
from megalith.generation.params import SamplingParams
from megalith.models.gpt import GPT
from megalith.parallel.devices import synchronize
from megalith.runtime.build import build_model

POSITIONS, LONG_PROMPT = 1152, 1024  # of the model; of the prompt whose time to the first token is measured
CASES = {  # name -> our sampling parameters, and transformers'
    "greedy": ({"temperature": 0.0}, {"do_sample": False}),
    "top-k 50": ({"top_k": 50}, {"do_sample": True, "top_k": 50}),
    "top-p 0.9": ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9, "top_k": 0}),
}
CACHES = "dynamic", "static"  # transformers'


def main() -> None:
    """Measure every case and print the tables."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, original = build_models(args)
    lines = header(args)
    if args.profile:
        lines.append(f"after {args.prompt} tokens; medians of {STEPS} steps\n")
        for rows in args.rows:
            engine = Engine(
                model, max_batch_size=rows, max_length=POSITIONS, compile=args.compile, prefix_caching=False
            )
            for case, (params, _) in CASES.items():
                requests = build_requests(args, rows, max_new_tokens=TOKENS, seed=1, **params)
                lines += [case, *profile_decoding(engine, requests), ""]
    else:
        lines.append(f"{args.new} new tokens after {args.prompt}; medians of {args.rounds} rounds\n")
        lines += [*decoding(args, model, original), "", *first_token(args, model, original)]
    text = "\n".join(lines).rstrip() + "\n"
    print(text, end="")
    if args.out:
        pathlib.Path(args.out).write_text(text)


def decoding(args: argparse.Namespace, model: GPT, original: GPT2LMHeadModel) -> list[str]:
    """The table of tokens a second."""
    lines = [
        f"{'tokens/s':20}{'dynamic':>9}{'static':>9}{'megalith':>10}{'ratio':>8}{'limit':>9}{'of limit':>10}"
        f"{'of greedy':>11}   same tokens"
    ]
    bandwidth = list[str]()
    for rows in args.rows:
        engine = Engine(
            model, max_batch_size=rows, max_length=args.prompt + args.new, compile=args.compile, prefix_caching=False
        )
        candidates: dict[tuple[str, str], Callable] = {("", "limit"): lambda n=rows: products(model, n, args.new)}
        for case, (params, choice) in CASES.items():
            requests = build_requests(args, rows, max_new_tokens=args.new, seed=1, **params)
            for cache in CACHES:
                candidates[case, cache] = lambda r=requests, c=choice, k=cache: theirs(
                    original, r, k, args.compile, **c
                )
            candidates[case, "megalith"] = lambda r=requests, e=engine: ours(e, r)
        seconds, tokens = take_turns(candidates, args.rounds, model.embedding.weight.device)
        speed = {key: rows * args.new / taken for key, taken in seconds.items()}
        for case in CASES:
            dynamic, static, here = (speed[case, name] for name in (*CACHES, "megalith"))
            limit, greedy = speed["", "limit"], speed["greedy", "megalith"]
            same = [tokens[case, "megalith"] == tokens[case, cache] for cache in CACHES]
            lines.append(
                f"{f'{rows} rows' if rows > 1 else '1 row'}, {case:12}{dynamic:10.1f}{static:9.1f}{here:10.1f}"
                f"{here / max(dynamic, static):8.2f}{limit:9.1f}{here / limit:10.2f}{here / greedy:11.2f}   "
                + (" and ".join("yes" if each else "no" for each in same) if case == "greedy" else "-")
            )
        if rows == 1:
            read = speed["greedy", "megalith"] * sum(weight.nbytes for weight in matrices_of(model)) / 1e9
            copied = copy_bandwidth(model.embedding.weight.device) / 1e9
            bandwidth = [
                f"1 row, greedy: weights are read at {read:.1f} GB/s, {read / copied:.2f} of a copy's {copied:.1f}"
            ]
    probs = original(torch.tensor([prompt(args, 0)], device=original.device)).logits[0, -1].float().softmax(dim=-1)
    kept = int((probs.sort(descending=True).values.cumsum(dim=-1) < 0.9).sum()) + 1
    return [*lines, *bandwidth, f"0.9 of the first new token's probability lies on {kept} of {args.vocab_size} tokens"]


def first_token(args: argparse.Namespace, model: GPT, original: GPT2LMHeadModel) -> list[str]:
    """The time to the first token of a long prompt."""
    requests = build_requests(args, 1, LONG_PROMPT, max_new_tokens=1, temperature=0.0)
    engine = Engine(model, max_batch_size=1, max_length=POSITIONS, compile=args.compile, prefix_caching=False)
    candidates: dict[str, Callable] = {
        cache: lambda k=cache: theirs(original, requests, k, args.compile, do_sample=False) for cache in CACHES
    }
    candidates["megalith"] = lambda: ours(engine, requests)
    seconds, tokens = take_turns(candidates, args.rounds, model.embedding.weight.device)
    shown = ", ".join(f"{name} {taken * 1e3:.1f} ms" for name, taken in seconds.items())
    ratio = seconds["megalith"] / min(seconds[cache] for cache in CACHES)
    same = "the same token" if tokens["megalith"] == tokens["dynamic"] else "not the same token"
    return [f"time to the first token after {LONG_PROMPT}: {shown} ({ratio:.2f} of the faster; {same})"]


def take_turns(candidates: Mapping, rounds: int, device: torch.device) -> tuple[dict, dict]:
    """Each candidate's median seconds, and what it returned the first time, which is not timed.

    candidates: key -> function without arguments.
    """
    returned = {key: run() for key, run in candidates.items()}
    seconds: dict = {key: [] for key in candidates}
    for _ in range(rounds):
        for key, run in candidates.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            seconds[key].append(time.perf_counter() - started)
    return {key: statistics.median(values) for key, values in seconds.items()}, returned


def ours(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """New tokens of each request."""
    tokens: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            tokens[event.id].append(event.token)
    return list(tokens.values())


def theirs(
    original: GPT2LMHeadModel, requests: Sequence[Request], cache: str, compile: bool = False, **choice
) -> list[list[int]]:  # fmt: skip
    """New tokens of each request, all in one batch, which lasts as long as the longest; uneven prompts are padded on
    the left, as that library wants them.
    """
    longest, new = (max(sizes) for sizes in zip(*map(size, requests)))
    padding = [longest - len(request.prompt_ids) for request in requests]
    ids = [[0] * pad + list(request.prompt_ids) for pad, request in zip(padding, requests)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    if cache == "static":
        choice["cache_implementation"] = "static"
        original._previous_max_cache_length = -1  # otherwise the cache is as long as the longest that ever was
        if compile:
            choice["compile_config"] = CompileConfig()
            choice["compile_config"]._compile_all_devices = True  # by itself it compiles on accelerators only
    out = original.generate(
        torch.tensor(ids, device=original.device), attention_mask=torch.tensor(mask, device=original.device),
        max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None, **choice,
    )  # fmt: skip
    return [row[: request.params.max_new_tokens] for row, request in zip(out[:, longest:].tolist(), requests)]


def size(request: Request) -> tuple[int, int]:
    """(tokens of the prompt, new tokens)."""
    return len(request.prompt_ids), request.params.max_new_tokens


@torch.no_grad()
def products(model: GPT, rows: int, new: int) -> None:
    """Every weight matrix times one token a row, `new` times."""
    matrices = matrices_of(model)
    inputs = [torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype) for weight in matrices]
    for _ in range(new):
        for x, weight in zip(inputs, matrices):
            nn.functional.linear(x, weight)


def matrices_of(model: GPT) -> list[torch.Tensor]:
    """The weights that each new token is multiplied by."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes, the best of ten of 256 MiB."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(11):  # the first is not counted: it maps the pages
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds[1:])


def prompt(args: argparse.Namespace, row: int, length: int | None = None) -> list[int]:
    """Token ids that differ from row to row."""
    return [(7 * i + 13 * row) % args.vocab_size for i in range(length or args.prompt)]


def build_requests(args: argparse.Namespace, rows: int, length: int | None = None, **params) -> list[Request]:
    """Requests of one length."""
    return [
        Request(prompt_ids=prompt(args, row, length), params=SamplingParams(**params), index=row) for row in range(rows)
    ]


@torch.no_grad()
def build_models(args: argparse.Namespace) -> tuple[GPT, GPT2LMHeadModel]:
    """Our model and transformers', with the same weights (biases are zero in both)."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = ModelConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, num_attention_heads=args.heads,
        vocab_size=args.vocab_size, max_position_embeddings=POSITIONS, hidden_dropout=0.0, attention_dropout=0.0,
        openai_gelu=True, init_method_std=args.init_std,
    )  # fmt: skip
    model = build_model(config, device, dtype, seed=1)
    theirs_config = GPT2Config(
        n_embd=args.hidden_size, n_layer=args.num_layers, n_head=args.heads, n_positions=POSITIONS,
        vocab_size=args.vocab_size, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    original = GPT2LMHeadModel(theirs_config).eval()
    body = original.transformer
    body.wte.weight.copy_(model.embedding.weight)
    body.wpe.weight.copy_(model.position_embedding.weight)
    for layer, block in zip(model.layers.values(), body.h):
        attention = layer.attention
        block.attn.c_attn.weight.copy_(torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]).t())
        block.attn.c_proj.weight.copy_(attention.out.weight.t())
        block.mlp.c_fc.weight.copy_(layer.mlp.up.weight.t())
        block.mlp.c_proj.weight.copy_(layer.mlp.down.weight.t())
    return model, original.to(device, dtype)


def header(args: argparse.Namespace) -> list[str]:
    """What was measured, on what."""
    name = pathlib.Path(sys.argv[0]).name
    return [
        f"command: python benchmarks/{shlex.join([name, *sys.argv[1:]])}",
        f"machine: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, transformers {transformers.__version__}",
        f"{args.num_layers} layers, hidden {args.hidden_size}, vocabulary {args.vocab_size}, {args.dtype}, "
        f"{args.device}, {args.threads} threads",
    ]


def arguments(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The command line; a parser that is given has options of its own."""
    if parser is None:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--compile", action="store_true", help="our step and theirs as one compiled graph each")
        parser.add_argument("--profile", action="store_true", help="print where a decoding step's time goes instead")
        for name in ("prompt", "new"):
            parser.add_argument(f"--{name}", type=int, default=64)
        parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], metavar="N", help="requests at one time")
    sizes = {"num-layers": 6, "hidden-size": 384, "heads": 6, "vocab-size": 50304, "rounds": 5, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--init-std", type=float, default=0.1, help="of the weights; larger: likelier likeliest tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="file for the tables")
    args = parser.parse_args()
    if getattr(args, "profile", False) and args.compile and args.device == "cpu":
        parser.error("--profile shows a step's operators, and a compiled step on a CPU is one call without any")
    return args


if __name__ == "__main__":
    main()
