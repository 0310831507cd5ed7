"""Tokenizers for tests, of the vocabularies in ../shared/data and of a small trained one; texts that are hard."""

import json
import pathlib

import pytest
from hypothesis import strategies as st

from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer

SHARED = pathlib.Path(__file__).parents[3].parent / "shared" / "data"


needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the vocabularies of ../shared/data, which are not part of the project"
)


def gpt2(**options) -> Tokenizer:
    return build_tokenizer(
        "GPT2BPETokenizer",
        vocab_file=str(SHARED / "gpt2/vocab.json"),
        merge_file=str(SHARED / "gpt2/merges.txt"),
        **options,
    )


def bert(kind="LowerCase", file="uncased", **options) -> Tokenizer:
    return build_tokenizer(
        f"BertWordPiece{kind}", vocab_file=str(SHARED / f"bert/bert-base-{file}-vocab.txt"), **options
    )


def sentencepiece(kind, model="sp_test_unigram_1k", **options) -> Tokenizer:
    return build_tokenizer(kind, tokenizer_model=str(SHARED / f"sentencepiece/{model}.model"), **options)


def special_ids(tokenizer):
    return {name: getattr(tokenizer, name) for name in ("eod", "bos", "eos", "pad", "cls", "sep", "mask")}


def trained_bpe_json(folder, **config) -> str:
    from megalith.data.corpus.bpe import train_bpe

    train_bpe(["the cat sat on the mat " * 20, "die Katze saß"], 300, folder / "tokenizer.json")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


# Characters on which normalizers and splitters disagree: controls, odd spaces, combining marks, ideographs, punctuation
TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \t\n\r\x00\x01_-\x0b\x0c\x1c\x85\xa0\u2028\u3000\u0301\u200d\ufffd.,'[]<|>中a A1é"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)
