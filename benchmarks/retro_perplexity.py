"""Does Retro read its neighbours? Perplexity with and without them on documents whose passages recur elsewhere.

    python benchmarks/retro_perplexity.py [--steps 1000] [--seeds 1 2 3] [--passage-chunks 8]

Documents come in pairs: passages of random words, and the same passages shuffled. Nothing can be learned of a word but
from the other document, so that without neighbours the perplexity is the number of words. Documents of validation are
half of a pair each; the other halves are in the database. The whole path is run: database, index by a BERT of random
weights (whose mean over tokens says which words a chunk has), neighbours, training, validation.

How long passages are decides on what there is to gain. What is read while chunk i + 1 is predicted are the neighbours
of chunk i, which was complete (paper, section 2.4): its copy, and what follows the copy. Inside a passage that is chunk
i + 1, and it can be copied. At a passage's end, as the passages are shuffled, it is not. So with passages of a single
chunk (--passage-chunks 1) there is little to gain, however good the model: only where a chunk of the sample, which is
cut anywhere, begins inside one passage and ends in the next. "could be copied" is the share of words
that, after the same word as here, stand in the neighbours that are read; what cannot be is a guess among all words, so
the perplexity is hardly below WORDS ** (1 - share).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
import tokenizers
import torch
import transformers

from megalith.config.run import RunConfig
from megalith.data.build import build_datasets
from megalith.data.indexed import IndexedWriter
from megalith.data.tokenizers.tokenizer import tokenizer_from_config
from megalith.retrieval.retro.neighbors import Query
from megalith.retrieval.retro.steps import RetroOptions, Steps
from megalith.training.pretrain import train

WORDS, CHUNK, CHUNKS = 128, 8, 48  # words, of a chunk, chunks of a document


def write_corpora(folder: pathlib.Path, pairs: int, passage_chunks: int, seed: int) -> tuple[str, str]:
    """Prefixes of training and validation data; of a tenth of the pairs one half is validation's."""
    random = np.random.RandomState(seed)
    names = str(folder / "train"), str(folder / "valid")
    with IndexedWriter(names[0], np.uint16) as training, IndexedWriter(names[1], np.uint16) as validation:
        for pair in range(pairs):
            passages = random.randint(0, WORDS, (CHUNKS // passage_chunks, passage_chunks * CHUNK))
            first = np.concatenate((random.randint(0, WORDS, random.randint(1, CHUNK)), passages.ravel()))
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
        vocab_size=len(words), hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
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
    """A run with neighbours. Weights begin with 0.1, as 0.02 is for models some ten times as wide."""
    return RunConfig().replace(
        model_type="retro", dataset="retro", num_layers=2, hidden_size=args.hidden_size, num_attention_heads=4,
        retro_layer_numbers=[2], retro_encoder_layers=1, retro_gpt_chunk_length=CHUNK, seq_length=8 * CHUNK,
        max_position_embeddings=8 * CHUNK, init_method_std=0.1, hidden_dropout=0.0, attention_dropout=0.0,
        retro_encoder_hidden_dropout=0.0, retro_encoder_attention_dropout=0.0, tokenizer_type="NullTokenizer",
        vocab_size=WORDS, train_data_path=[data[0]], valid_data_path=[data[1]], micro_batch_size=args.batch,
        global_batch_size=args.batch, train_iters=args.steps, lr=args.lr, lr_warmup_iters=args.steps // 20,
        lr_decay_style="cosine", weight_decay=0.01, adam_beta2=0.95, eval_interval=args.steps, eval_iters=10,
        log_interval=50, seed=seed, progress="none", device=args.device, retro_workdir=str(folder / "retro"),
    )  # fmt: skip


def copied_share(config: RunConfig) -> float:
    """The share of validation's words that could be copied: see the top of this file."""
    dataset = build_datasets(config, tokenizer_from_config(config.data, config.model.vocab_size))["valid"]
    found = []
    for sample in (dataset[number] for number in range(config.validation.eval_iters * config.batch.global_batch_size)):
        for place, (word, wanted) in enumerate(zip(sample["input_ids"], sample["labels"])):
            read, chunk = False, (place + 1) // CHUNK - 1
            if chunk >= 0:
                texts, mask = sample["neighbor_tokens"][chunk], sample["neighbor_mask"][chunk]
                read = bool(((texts[:, :-1] == word) & (texts[:, 1:] == wanted) & (mask[:, 1:] == 1)).any())
            found.append(read)
    return statistics.mean(found)


def perplexity(config: RunConfig) -> float:
    """Train, or measure, and return the perplexity of the last validation."""
    train(config)
    lines = [json.loads(line) for line in (pathlib.Path(config.run_folder) / "metrics.jsonl").read_text().splitlines()]
    return math.exp([line["validation_loss"] for line in lines if "validation_loss" in line][-1])


def measure(args: argparse.Namespace, folder: pathlib.Path, seed: int) -> tuple[float, float, float, float]:
    """(share that could be copied, and perplexities: trained and measured with neighbours, trained without, trained
    with and measured without).
    """
    config = config_of(args, folder, seed, write_corpora(folder, args.pairs, args.passage_chunks, seed))
    bert = write_bert(folder / "bert", seed)
    options = RetroOptions(
        workdir=str(folder / "retro"), load=bert, chunk_length=CHUNK,
        query=Query(num_query=50, num_target=2, max_length=16),
    )  # fmt: skip
    steps = Steps(config, options, print)
    for step in (steps.db, steps.index, steps.neighbors):
        print(step(), flush=True)
    off = {"retro_no_retrieval": True, "retro_workdir": None}
    return (
        copied_share(config),
        perplexity(config.replace(run_dir=str(folder / "with"))),
        perplexity(config.replace(run_dir=str(folder / "without"), **off)),
        perplexity(
            config.replace(run_dir=str(folder / "off"), load=str(folder / "with"), skip_train=True, **off)
        ),
    )  # fmt: skip


def main() -> None:
    """Run every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--passage-chunks", type=int, default=8, help="chunks of a passage, of 48 (default: 8)")
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    about = f"{args.steps} steps, {WORDS} words, passages of {args.passage_chunks} chunks of {CHUNK} words"
    print(f"{platform.machine()}, torch {torch.__version__}, {about}", flush=True)
    print("seed   could be copied   with neighbours   without   trained with, measured without", flush=True)
    for seed in args.seeds:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            share, *found = measure(args, pathlib.Path(folder), seed)
        columns = f"{share:15.1%}   {found[0]:15.2f}   {found[1]:7.2f}   {found[2]:30.2f}"
        print(f"{seed:4}   {columns}   ({time.process_time() - start:.0f} s of one core)", flush=True)


if __name__ == "__main__":
    main()
