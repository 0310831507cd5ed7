"""Does Retro read its neighbours? Perplexity with and without them on documents whose passages recur elsewhere.

    python benchmarks/retro_perplexity.py [--steps 1500] [--seeds 1 2 3]

Documents come in pairs: random words, and the same passages shuffled. Nothing can be learned of a word but from the
other document: without neighbours the perplexity is the number of words. Chunks of samples do not begin where passages
do, so that a neighbour, which resembles a chunk, holds the rest of the passage that the chunk ends in. Documents of
validation are half of a pair each; the other halves are in the database. The whole path is run: database, index by a
BERT of random weights (whose mean over tokens says which words a chunk has), neighbours, training, validation.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import statistics
import tempfile

import numpy as np
import tokenizers
import torch
import transformers

from megalith.config.run import RunConfig
from megalith.data.indexed import IndexedWriter
from megalith.retrieval.retro.neighbors import Query
from megalith.retrieval.retro.steps import RetroOptions, Steps
from megalith.training.pretrain import train

WORDS, PASSAGE, PASSAGES = 256, 16, 12  # words, of a passage, passages of a document


def write_corpora(folder: pathlib.Path, pairs: int, seed: int) -> tuple[str, str]:
    """Prefixes of training and validation data; of a tenth of the pairs one half is validation's."""
    random = np.random.RandomState(seed)
    names = str(folder / "train"), str(folder / "valid")
    with IndexedWriter(names[0], np.uint16) as training, IndexedWriter(names[1], np.uint16) as validation:
        for pair in range(pairs):
            passages = random.randint(0, WORDS, (PASSAGES, PASSAGE))
            first = np.concatenate((random.randint(0, WORDS, random.randint(1, PASSAGE)), passages.ravel()))
            other = random.permutation(passages).ravel()
            for words, writer in ((first, validation if pair % 10 == 0 else training), (other, training)):
                writer.add_sequence(np.append(words, WORDS))
                writer.end_document()
    return names


def write_bert(folder: pathlib.Path, seed: int) -> str:
    """A BERT of random weights whose vocabulary are the words."""
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(WORDS))]
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=64, initializer_range=0.02,
    )  # fmt: skip
    transformers.BertForPreTraining(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    return str(folder)


def config_of(args: argparse.Namespace, folder: pathlib.Path, seed: int, data: tuple[str, str]) -> RunConfig:
    """A run with neighbours."""
    return RunConfig().replace(
        model_type="retro", dataset="retro", num_layers=3, hidden_size=args.hidden_size, num_attention_heads=4,
        retro_layer_numbers=[2, 3], retro_gpt_chunk_length=PASSAGE, seq_length=4 * PASSAGE,
        max_position_embeddings=4 * PASSAGE, hidden_dropout=0.0, attention_dropout=0.0,
        retro_encoder_hidden_dropout=0.0, retro_encoder_attention_dropout=0.0, tokenizer_type="NullTokenizer",
        vocab_size=WORDS, train_data_path=[data[0]], valid_data_path=[data[1]], micro_batch_size=args.batch,
        global_batch_size=args.batch, train_iters=args.steps, lr=args.lr, lr_warmup_iters=args.steps // 20,
        lr_decay_style="cosine", weight_decay=0.01, eval_interval=args.steps, eval_iters=20, log_interval=100,
        seed=seed, progress="none", device=args.device, retro_workdir=str(folder / "retro"),
    )  # fmt: skip


def perplexity(config: RunConfig) -> float:
    """Train, or measure, and return the perplexity of the last validation."""
    train(config)
    lines = [json.loads(line) for line in (pathlib.Path(config.run_folder) / "metrics.jsonl").read_text().splitlines()]
    return math.exp([line["validation_loss"] for line in lines if "validation_loss" in line][-1])


def measure(args: argparse.Namespace, folder: pathlib.Path, seed: int) -> tuple[float, float, float]:
    """(trained and measured with neighbours, trained without, trained with and measured without)."""
    config = config_of(args, folder, seed, write_corpora(folder, args.pairs, seed))
    bert = write_bert(folder / "bert", seed)
    options = RetroOptions(
        workdir=str(folder / "retro"), load=bert, chunk_length=PASSAGE, workers=2,
        query=Query(num_query=50, num_target=2, max_length=32),
    )  # fmt: skip
    steps = Steps(config, options, print)
    for step in (steps.db, steps.index, steps.neighbors):
        print(step(), flush=True)
    off = {"retro_no_retrieval": True, "retro_workdir": None}
    return (
        perplexity(config.replace(run_dir=str(folder / "with"))),
        perplexity(config.replace(run_dir=str(folder / "without"), **off)),
        perplexity(
            config.replace(run_dir=str(folder / "off"), load=str(folder / "with"), skip_train=True, **off)
        ),
    )  # fmt: skip


def main() -> None:
    """Run every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(args, pathlib.Path(folder), seed))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.steps} steps, {WORDS} words")
    print("seed   with neighbours   without   trained with, measured without")
    for seed, row in zip(args.seeds, rows):
        print(f"{seed:4}   {row[0]:15.2f}   {row[1]:7.2f}   {row[2]:30.2f}")
    means = [statistics.mean(column) for column in zip(*rows)]
    print(f"mean   {means[0]:15.2f}   {means[1]:7.2f}   {means[2]:30.2f}")


if __name__ == "__main__":
    main()
