"""Corpora of numbers, and a BERT with random weights whose vocabulary is these numbers."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from megalith.config.run import RunConfig
from megalith.data.indexed import IndexedWriter
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalith.retrieval.retro.steps import RetroOptions, Steps

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS, EOD, LENGTH = 40, 40, 8  # tokens 0 to 39, the end of a document, tokens of a chunk


def write_corpus(prefix: str, documents: int = 30, seed: int = 0) -> str:
    """Documents of 0 to 40 tokens, each with its end; the fifth has a chunk of ends alone, and the sixth no token.

    Two seeds have no chunk in common, so that no two vectors are equal.
    """
    random = np.random.RandomState(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(documents):
            tokens = random.randint(0, WORDS, random.randint(0, 41))
            if number == 5:
                tokens = np.array([7 + seed] * LENGTH + [EOD] * LENGTH + [9, 10 + seed])
            writer.add_sequence(np.append(tokens, EOD) if number != 6 else np.array([EOD]))
            writer.end_document()
    return prefix


def write_bert(folder: pathlib.Path, words: Sequence[str] = (), positions: int = 32) -> str:
    """A BERT of transformers with its vocabulary, special tokens and `words`; default: the numbers."""
    import tokenizers
    import torch
    import transformers

    words = [*SPECIAL, *(words or map(str, range(WORDS)))]
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, initializer_range=1.0,
    )  # fmt: skip
    transformers.BertForPreTraining(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}))
    return str(folder)


def gpt_tokenizer() -> Tokenizer:
    """Numbers for tokens."""
    return build_tokenizer("NullTokenizer", vocab_size=WORDS)


def bert_tokenizer(bert: str) -> Tokenizer:
    """The tokenizer of `write_bert`."""
    return build_tokenizer("BertWordPieceLowerCase", vocab_file=f"{bert}/vocab.txt")


def config_of(*data: str, **changes) -> RunConfig:
    """A run of 24 samples of 4 chunks."""
    values = dict(
        data_path=list(data), tokenizer_type="NullTokenizer", vocab_size=WORDS, split="80,15,5", seq_length=4 * LENGTH,
        global_batch_size=4, micro_batch_size=4, train_iters=6, eval_iters=1, eval_interval=3, seed=11, device="cpu",
    )  # fmt: skip
    return RunConfig().replace(**(values | changes))


def steps_of(config: RunConfig, workdir: object, bert: str, **changes) -> Steps:
    """The steps in a folder, with small blocks."""
    from megalith.retrieval.retro.neighbors import Query

    query = Query(num_query=12, num_target=5, batch_size=9, block_chunks=20, max_length=12)
    values = dict(
        workdir=str(workdir), load=bert, chunk_length=LENGTH, doc_block_size=7, shard_rows=25, query=query,
        bert_tokenizer={"vocab_file": f"{bert}/vocab.txt"},
    )  # fmt: skip
    return Steps(config, RetroOptions(**(values | changes)), lambda line: print(line))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
