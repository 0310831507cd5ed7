"""Does the inverse cloze task learn? Held-out articles: is a sentence's own block among the best five of a batch?

    python benchmarks/ict.py ../shared/data/bert/bert-base-uncased-vocab.txt \
        ../shared/data/loose_json/wikitext2_test_articles.jsonl ../shared/data/loose_json/gutenberg_docs.jsonl.gz

A small bi-encoder begins with random weights. Of the documents, shuffled, a tenth is held out. Prints for each seed the
share of held-out queries whose own block is the best, or among the best five, of the blocks of a batch, before the
first step and while it trains; chance is 1 and 5 in a batch. --query-in-block-prob counts in both: so often a sentence
stays in its block, in validation too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import platform
import random
import re
import statistics
import tempfile
import time

import torch

from megalith.config.run import RunConfig
from megalith.data.corpus.preprocess import PreprocessOptions, preprocess
from megalith.data.tokenizers.tokenizer import TokenizerOptions
from megalith.training.pretrain import train

TOKENIZER = "BertWordPieceLowerCase"


def write_corpus(files: list[pathlib.Path], vocabulary: str, folder: pathlib.Path) -> str:
    """The prefix of an indexed dataset of sentences of all documents, in a random order."""
    texts = [json.loads(line)["text"] for file in files for line in open_text(file)]
    random.Random(0).shuffle(texts)
    path = folder / "articles.jsonl"
    path.write_text("".join(json.dumps({"text": without_marks(text)}) + "\n" for text in texts))
    tokenizer = TokenizerOptions(tokenizer_type=TOKENIZER, vocab_file=vocabulary)
    options = PreprocessOptions(
        input=[str(path)], output_prefix=str(folder / "articles"), tokenizer=tokenizer, split_sentences=True, workers=1
    )
    return str(preprocess(options).prefixes["text"])


def open_text(file: pathlib.Path):
    """A file of JSON lines, compressed or not."""
    return gzip.open(file, "rt") if file.suffix == ".gz" else open(file)


def without_marks(text: str) -> str:
    """WikiText without its marks: "<unk>" would be three tokens of no meaning in every sentence, "@-@" is a hyphen."""
    return re.sub(r" @(.)@ ", r"\1", text.replace(" <unk>", ""))


def config_of(args: argparse.Namespace, data: str, seed: int, run: str) -> RunConfig:
    """A run that validates before its first step and five times on its way."""
    return RunConfig().replace(
        model_type="ict", dataset="ict", loss="ict", num_layers=2, hidden_size=128, num_attention_heads=2,
        biencoder_projection_dim=128, biencoder_shared_query_context_model=args.shared, seq_length=64,
        max_position_embeddings=64, hidden_dropout=args.dropout, attention_dropout=args.dropout,
        tokenizer_type=TOKENIZER, vocab_file=args.vocab, data_path=[data], split="90,10,0",
        query_in_block_prob=args.query_in_block_prob, micro_batch_size=args.batch, global_batch_size=args.batch,
        train_iters=args.steps, lr=args.lr, lr_warmup_fraction=0.1, eval_interval=max(1, args.steps // 5),
        eval_iters=args.eval_iters, log_interval=10**6, seed=seed, run_dir=run, progress="none", device="cpu",
    )  # fmt: skip


def validations(run: str) -> list[tuple[int, float, float, float]]:
    """(step, loss, top-1, top-5 accuracy) of each validation."""
    lines = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["validation_loss"], *line["validation_metrics"].values())
        for line in lines if "validation_loss" in line
    ]  # fmt: skip


def main() -> None:
    """Train each seed and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocab", help="vocabulary of WordPiece")
    parser.add_argument("articles", type=pathlib.Path, nargs="+", help="JSON lines with a `text`")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--eval-iters", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--shared", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--query-in-block-prob", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    settings = f"{args.steps} steps, sentences that stay in their block: {args.query_in_block_prob}"
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads; {settings}")
    print(f"chance: top-1 {1 / args.batch:.4f}, top-5 {5 / args.batch:.4f}", flush=True)
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_corpus(args.articles, args.vocab, pathlib.Path(folder))
        for seed in args.seeds:
            run, begun = f"{folder}/{seed}", time.process_time()
            train(config_of(args, data, seed, run))
            found = validations(run)
            for step, loss, first, five in found:
                print(f"seed {seed} step {step:4}: loss {loss:.3f}, top-1 {first:.4f}, top-5 {five:.4f}", flush=True)
            print(f"seed {seed}: {time.process_time() - begun:.0f} CPU seconds", flush=True)
            ends.append(found[-1][2:])
    for name, values in zip(("top-1", "top-5"), zip(*ends)):
        print(f"{name} at the end: {statistics.mean(values):.4f} +- {statistics.pstdev(values):.4f}", flush=True)


if __name__ == "__main__":
    main()
