"""The three steps of megalith retro over so many megabytes of text: time of each, and memory of its largest process.

    python benchmarks/retro.py --megabytes 50 --hidden-size 256 --num-layers 4 --index-string IVF256,Flat --workers 2

The text is what every machine has (workflows/corpus.py), the BERT has random weights. Prints a JSON line for each step;
the logs are in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time


def write_texts(path: pathlib.Path, megabytes: float) -> None:
    """So much text: what the machine has, and then the same documents again with their lines shuffled."""
    from megalith.workflows.corpus import write_corpus

    write_corpus(path, megabytes)
    documents = path.read_text(encoding="utf-8").splitlines()
    size, generator = path.stat().st_size, random.Random(1)
    with open(path, "a", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            lines = json.loads(documents[generator.randrange(len(documents))])["text"].splitlines()
            generator.shuffle(lines)
            size += file.write(json.dumps({"text": "\n".join(lines)}) + "\n")


def write_bert(folder: pathlib.Path, words: list[str], hidden_size: int, num_layers: int) -> None:
    """A BERT of transformers over these words."""
    import tokenizers
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64, intermediate_size=4 * hidden_size, max_position_embeddings=256,
    )  # fmt: skip
    transformers.BertForPreTraining(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}))


def measured(what: str, command: list[str], folder: pathlib.Path) -> None:
    """Run a command, and print how long it took and the memory of its largest process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "megalith", *command], cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{what} failed")
    facts = {"what": what, "seconds": round(time.perf_counter() - start, 1), "peak_mib": round(usage.ru_maxrss / 1024)}
    print(json.dumps(facts | {"printed": printed.strip().splitlines()[-1:]}), flush=True)


def prepare(folder: pathlib.Path, megabytes: float, hidden_size: int, num_layers: int) -> None:
    """Write corpus.jsonl, tokenizer.json and bert/."""
    from megalith.data.corpus.bpe import train_bpe

    write_texts(folder / "corpus.jsonl", megabytes)
    with open(folder / "corpus.jsonl", encoding="utf-8") as file:
        sample = file.read(2_000_000)
    train_bpe([sample], 8192, folder / "tokenizer.json")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(set(re.findall(r"[a-z0-9]+", sample.lower())))[:20_000],
    ]
    write_bert(folder / "bert", words, hidden_size, num_layers)


def main() -> None:
    """Make the text and the BERT, run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--max-chunk-length", type=int, default=256, help="tokens that the BERT reads of a chunk")
    parser.add_argument("--index-string", default="IVF256,Flat")
    parser.add_argument("--nprobe", type=int, default=65536, help="lists of the index that a query looks in")
    parser.add_argument("--train-samples", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # in a process of its own: a process's peak counts the memory of the one that started it
        given = (folder, args.megabytes, args.hidden_size, args.num_layers)
        preparing = multiprocessing.get_context("spawn").Process(target=prepare, args=given)
        preparing.start()
        preparing.join()
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer.json"]
        preprocess = [
            "--input",
            "corpus.jsonl",
            "--output-prefix",
            "text",
            "--append-eod",
            "--workers",
            str(args.workers),
        ]
        measured("preprocess", ["data", "preprocess", *preprocess, *tokenizer], folder)
        flags = [
            "--retro-workdir", "retro", "--load", "bert", "--data-path", "text_text_document", "--seq-length", "512",
            "--global-batch-size", "10", "--train-samples", str(args.train_samples), "--eval-interval", "50",
            "--eval-iters", "1", "--retro-index-str", args.index_string, "--retro-doc-block-size", "1000",
            "--retro-query-nprobe", str(args.nprobe),
            "--retro-bert-max-chunk-length", str(args.max_chunk_length), *tokenizer,
        ]  # fmt: skip
        measured("db", ["retro", "db", *flags, "--workers", str(args.workers)], folder)
        for step in ("index", "neighbors"):
            measured(step, ["retro", step, *flags], folder)
        measured("verify", ["retro", "verify", "retro"], folder)


if __name__ == "__main__":
    main()
