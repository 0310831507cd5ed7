"""Speed of finetuning: packed chats against pretraining, and LoRA against all weights; same model, same run.

    python benchmarks/finetune.py        # CPU: 4 layers, hidden 256, sequence 512, micro-batch 4, vocabulary 16384
    python benchmarks/finetune.py --device cuda --bf16 --num-layers 24 --hidden-size 1024 --heads 16 --sequence 2048

Candidates take turns in one process, a whole step each (data read, forward, backward, optimizer), back and forth, so
that a load that comes and goes meets all alike. A ratio is the median of those within each round, with quartiles. Rows
of chats hold a little padding, so that tokens/s are given of rows, and the share of them that is no padding. Writes
benchmarks/results/finetune.txt.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the project itself, where it is not installed
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CANDIDATES = ("pretrain", "chat", "chat-unpacked", "pretrain-reset", "lora")
COMPARED = (("chat", "pretrain"), ("chat", "pretrain-reset"), ("lora", "chat"))
RESULTS = pathlib.Path(__file__).parent / "results/finetune.txt"


def main() -> None:
    """Time every candidate in turn and print the table."""
    args = arguments()
    from megalith.parallel.mesh import init_mesh  # after the arguments, as it imports torch
    from megalith.training.build import set_determinism

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        make_data(folder, args)
        base = config(folder, args)
        set_determinism(base)
        mesh = init_mesh(base.parallel)
        runs = {name: Candidate(candidate_config(base, folder, name), mesh) for name in args.candidates}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(args.rounds + 2):  # the first two warm up
            for name in list(runs)[:: -1 if number % 2 else 1]:
                taken = runs[name].step()
                if number >= 2:
                    seconds[name].append(taken)
    report(args, runs, seconds)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=24, help="timed steps of each candidate")
    return parser.parse_args()


def make_data(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """A tokenizer, chats of lognormal lengths, and the same chats' tokens as an indexed dataset."""
    import numpy as np
    import tokenizers

    from megalith.data.indexed import IndexedWriter

    draw = random.Random(0)
    words = [f"w{number}" for number in range(1000)]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (folder / "tokenizer").mkdir()
    made.save(str(folder / "tokenizer/tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    longest = args.sequence // 2 - 16
    with open(folder / "chats.jsonl", "w") as file, IndexedWriter(str(folder / "corpus"), np.uint16) as writer:
        for _ in range(args.chats):
            lengths = [max(2, min(longest, int(draw.lognormvariate(4, 0.8)))) for _ in range(2)]
            texts = [" ".join(draw.choices(words, k=length)) for length in lengths]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
            file.write(json.dumps({"messages": turns}) + "\n")
            ids = made.encode(" ".join(texts)).ids
            writer.add_sequence(np.array([*ids, made.token_to_id("<|im_end|>")]))
            writer.end_document()


def config(folder: pathlib.Path, args: argparse.Namespace):
    """What all candidates have in common."""
    from megalith.config.run import RunConfig

    return RunConfig().replace(
        num_layers=args.num_layers, hidden_size=args.hidden_size, num_attention_heads=args.heads,
        seq_length=args.sequence, max_position_embeddings=args.sequence, vocab_size=args.vocab_size,
        position_embedding_type="rope", swiglu=True, normalization="RMSNorm", add_bias_linear=False,
        micro_batch_size=args.micro_batch, global_batch_size=args.micro_batch, bf16=args.bf16, compile=args.compile,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer"), device=args.device,
        train_iters=10**4, lr=1e-4, split="1", eval_iters=0, run_dir=str(folder / "run"), lora_rank=0,
    )  # fmt: skip


def candidate_config(base, folder: pathlib.Path, name: str):
    """The config of one candidate."""
    chats = {"dataset": "chat", "train_data": [str(folder / "chats.jsonl")]}
    corpus = {"data_path": [str(folder / "corpus")]}
    changes = {
        "pretrain": corpus,
        "pretrain-reset": {**corpus, "reset_position_ids": True, "reset_attention_mask": True},
        "chat": chats,
        "chat-unpacked": {**chats, "packing": False},
        "lora": {**chats, "lora_rank": arguments().lora_rank},
    }
    return base.replace(**changes[name])


class Candidate:
    """A trainer with its data."""

    def __init__(self, config, mesh):
        from megalith.training.build import build_loaders, open_datasets, open_tokenizer, trainer_from
        from megalith.training.resume.start import Start
        from megalith.training.resume.state import Progress

        tokenizer, _ = open_tokenizer(config)
        self.loader = build_loaders(config, mesh, open_datasets(config, mesh, tokenizer))["train"]
        self.trainer = trainer_from(Start(), config, mesh, tokenizer)
        self.progress, self.batch = Progress(), config.batch.global_batch_size
        self.tokens = self.counted = 0  # of all steps: of rows, and of them those that are not padding

    def step(self) -> float:
        """Run a step; seconds."""
        import torch

        from megalith.training.step import train_step

        began = time.perf_counter()
        batches = self.loader.step(self.progress.consumed_train_samples, self.batch)
        result = train_step(self.trainer, batches, self.progress)
        if self.trainer.device.type != "cpu":
            torch.get_device_module(self.trainer.device).synchronize()
        taken = time.perf_counter() - began
        self.progress.iteration += 1
        self.progress.consumed_train_samples += self.batch
        self.tokens += result.tokens
        self.counted += sum(counted_tokens(batch) for batch in batches)
        return taken


def counted_tokens(batch) -> int:
    """Tokens of a batch up to the last one that a sample of chats has; all, of a corpus."""
    mask = batch["loss_mask"]
    lengths = mask.shape[1] - mask.flip(1).ne(0).int().argmax(dim=1)  # a chat ends with its answer
    return int(lengths.sum())


def report(args: argparse.Namespace, runs: dict[str, Candidate], seconds: dict[str, list[float]]) -> None:
    """Print the table and the ratios, and keep them."""
    import torch

    size = args.micro_batch * args.sequence
    lines = [
        f"command: python benchmarks/{shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"machine: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"{args.num_layers} layers, hidden {args.hidden_size}, {args.micro_batch} rows of {args.sequence} tokens, "
        f"vocabulary {args.vocab_size}, {args.device}; medians of {args.rounds} rounds",
        "",
        f"{'':16}{'ms a step':>12}{'tokens/s':>12}{'not padding':>14}",
    ]
    for name, run in runs.items():
        middle = statistics.median(seconds[name])
        lines.append(f"{name:16}{1e3 * middle:12.1f}{size / middle:12.0f}{run.counted / run.tokens:14.1%}")
    for one, other in COMPARED:
        if one in runs and other in runs:
            ratios = [theirs / own for own, theirs in zip(seconds[one], seconds[other])]
            low, middle, high = statistics.quantiles(ratios, n=4)
            lines.append(f"{one} / {other}: {middle:.3f} of its tokens/s (quartiles {low:.3f} to {high:.3f})")
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
