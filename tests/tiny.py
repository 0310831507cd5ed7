"""Corpora of tiny documents with something to learn, configs that train in a second, and what a run recorded."""

import json
import pathlib

import numpy as np

from megalith.config.run import RunConfig
from megalith.data.indexed import IndexedWriter

VOCABULARY = 48  # tokens 0 to 47, and 48 as the end of a document


def write_corpus(prefix: str, documents: int = 120, seed: int = 0) -> str:
    """Documents that count upwards from a random token: the next token is a function of the last."""
    random = np.random.RandomState(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            first, length = random.randint(0, VOCABULARY), random.randint(5, 40)
            writer.add_sequence(np.append((first + np.arange(length)) % VOCABULARY, VOCABULARY))
            writer.end_document()
    return prefix


def tiny_config(prefix: str, folder: str, **changes) -> RunConfig:
    """A two-layer GPT and a run of 12 steps of 8 samples, dropout on."""
    values = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=16,
        max_position_embeddings=16,
        tokenizer_type="NullTokenizer",
        vocab_size=VOCABULARY,
        data_path=[prefix],
        split="90,5,5",
        micro_batch_size=4,
        global_batch_size=8,
        train_iters=12,
        lr=5e-3,
        lr_warmup_iters=2,
        lr_decay_style="cosine",
        eval_interval=6,
        eval_iters=2,
        log_interval=4,
        run_dir=folder,
        progress="none",
        device="cpu",
    )
    return RunConfig().replace(**(values | changes))


def write_sentences(prefix: str, documents: int = 60, seed: int = 0) -> str:
    """Documents whose sentences repeat one of eight words, each the one after the last.

    A vocabulary for WordPiece is written too: `prefix`.vocab.
    """
    words = [f"w{number}" for number in range(VOCABULARY)]
    pathlib.Path(f"{prefix}.vocab").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    random = np.random.RandomState(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            first = random.randint(0, VOCABULARY)
            for length in random.randint(3, 9, random.randint(2, 8)):
                writer.add_sequence(np.full(length, 5 + first % 8))
                first += 1
            writer.end_document()
    return prefix


def tiny_bert(prefix: str, folder: str, **changes) -> RunConfig:
    """The run of `tiny_config` with a BERT, on what `write_sentences` wrote."""
    values = dict(
        model_type="bert",
        dataset="bert",
        loss="bert",
        tokenizer_type="BertWordPieceLowerCase",
        vocab_file=f"{prefix}.vocab",
    )
    return tiny_config(prefix, folder, vocab_size=None, seq_length=24, max_position_embeddings=24).replace(
        **(values | changes)
    )


def tiny_ict(prefix: str, folder: str, **changes) -> RunConfig:
    """The run of `tiny_config` with a bi-encoder, on what `write_sentences` wrote."""
    values = dict(model_type="ict", dataset="ict", loss="ict", biencoder_projection_dim=16, use_one_sent_docs=True)
    return tiny_bert(prefix, folder, **(values | changes))


def tiny_t5(prefix: str, folder: str, **changes) -> RunConfig:
    """The run of `tiny_config` with a T5, on what `write_sentences` wrote."""
    values = dict(model_type="t5", dataset="t5", loss="t5", vocab_extra_ids=20, decoder_seq_length=16)
    return tiny_bert(prefix, folder, **(values | changes))


def losses(folder: str) -> list[float]:
    """The training losses that metrics.jsonl of a run holds, one per step."""
    return [line["loss"] for line in records(folder) if "loss" in line]


def records(folder: str) -> list[dict]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
