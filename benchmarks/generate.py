"""Decoding speed against transformers' `generate`: the same weights, prompts and process, greedy and sampled, in turns.

    python benchmarks/generate.py                     # CPU: 6 layers, hidden 384, vocabulary 50304, float32
    python benchmarks/generate.py --device cuda --dtype bfloat16 --num-layers 24 --hidden-size 1024 --heads 16 --compile

Tokens/s counts new tokens and includes the reading of the prompts. "limit" only streams the model's weights through
matrix products of one token per row: what the machine would reach if all else were free. Medians of --rounds rounds.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from megalith.config.sections.model import ModelConfig
from megalith.generation.engine import Engine
from megalith.generation.generate import complete
from megalith.models.gpt import GPT
from megalith.parallel.devices import synchronize
from megalith.runtime.build import build_model

LIMIT = 1024  # positions


def main() -> None:
    """Measure every case and print a table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    form = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "openai_gelu": True,
        "max_position_embeddings": LIMIT,
        "init_method_std": 0.1,
    }
    sizes = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.heads,
        "vocab_size": args.vocab_size,
    }
    model = build_model(ModelConfig(**sizes, **form), device, dtype, seed=1)
    original = hugging_face(model, args).to(device, dtype)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {args.device}, {args.dtype}")
    print(
        f"{args.num_layers} layers, hidden {args.hidden_size}, vocabulary {args.vocab_size}; {args.new} new tokens "
        f"after {args.prompt}\n"
    )
    print(
        f"{'case':36}{'transformers':>14}{'megalith':>12}{'ratio':>8}{'limit':>12}{'of limit':>10}   tokens/s; same "
        f"tokens"
    )
    for rows, ragged, sampled in (
        (1, False, False),
        (1, False, True),
        (8, False, False),
        (8, True, False),
        (8, False, True),
    ):
        prompts = [
            [(7 * i + 13 * row) % args.vocab_size for i in range(args.prompt - (3 * row if ragged else 0))]
            for row in range(rows)
        ]
        target = (
            Engine(model, max_batch_size=rows, max_length=args.prompt + args.new, compile=True)
            if args.compile
            else model
        )
        candidates: dict[str, Callable[[], list[list[int]]]] = {
            "theirs": lambda p=prompts, s=sampled: theirs(original, p, args.new, s),
            "ours": lambda p=prompts, s=sampled, t=target: ours(t, p, args.new, s),
            "limit": lambda r=rows: products(model, r, args.new),
        }
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        made = {name: run() for name, run in candidates.items()}  # and warm
        for _ in range(args.rounds):
            for name, run in candidates.items():
                started = time.perf_counter()
                run()
                synchronize(device)
                seconds[name].append(time.perf_counter() - started)
        speed = {name: rows * args.new / statistics.median(times) for name, times in seconds.items()}
        case = (
            f"{rows} row{'s' if rows > 1 else ''}{', ragged' if ragged else ''}, {'top-k 50' if sampled else 'greedy'}"
        )
        same = "-" if sampled else "yes" if made["ours"] == made["theirs"] else "no"
        print(
            f"{case:36}{speed['theirs']:14.1f}{speed['ours']:12.1f}{speed['ours'] / speed['theirs']:8.2f}"
            f"{speed['limit']:12.1f}{speed['ours'] / speed['limit']:10.2f}   {same}",
            flush=True,
        )


def ours(model: nn.Module | Engine, prompts: list[list[int]], new: int, sampled: bool) -> list[list[int]]:
    """New tokens of each row."""
    return [made.ids for made in complete(model, prompts, max_new_tokens=new, top_k=50 if sampled else 1, seed=1)]


def theirs(original: GPT2LMHeadModel, prompts: list[list[int]], new: int, sampled: bool) -> list[list[int]]:
    """New tokens of each row; uneven prompts are padded on the left, as that library wants them."""
    longest, device = max(map(len, prompts)), original.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    choice = {"do_sample": True, "top_k": 50} if sampled else {"do_sample": False}
    out = original.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None, **choice
    )
    return out[:, longest:].tolist()


@torch.no_grad()
def products(model: GPT, rows: int, new: int) -> list[list[int]]:
    """Every weight matrix times one token a row, `new` times."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype) for weight in matrices]
    for _ in range(new):
        for x, weight in zip(inputs, matrices):
            nn.functional.linear(x, weight)
    return []


@torch.no_grad()
def hugging_face(model: GPT, args: argparse.Namespace) -> GPT2LMHeadModel:
    """transformers' model with the same weights (biases are zero in both)."""
    config = GPT2Config(
        n_embd=args.hidden_size,
        n_layer=args.num_layers,
        n_head=args.heads,
        n_positions=LIMIT,
        vocab_size=args.vocab_size,
        bos_token_id=0,
        eos_token_id=None,
    )
    made = GPT2LMHeadModel(config).eval()
    body = made.transformer
    body.wte.weight.copy_(model.embedding.weight)
    body.wpe.weight.copy_(model.position_embedding.weight)
    for layer, block in zip(model.layers.values(), body.h):
        attention = layer.attention
        block.attn.c_attn.weight.copy_(torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]).t())
        block.attn.c_proj.weight.copy_(attention.out.weight.t())
        block.mlp.c_fc.weight.copy_(layer.mlp.up.weight.t())
        block.mlp.c_proj.weight.copy_(layer.mlp.down.weight.t())
    return made


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "num-layers": 6,
        "hidden-size": 384,
        "heads": 6,
        "vocab-size": 50304,
        "prompt": 64,
        "new": 128,
        "rounds": 5,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="our step as one compiled graph")
    return parser.parse_args()


if __name__ == "__main__":
    main()
