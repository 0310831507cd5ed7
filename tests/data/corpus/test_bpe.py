"""A vocabulary of one's own: repeatable, complete, of the size asked for."""

import pytest

from megalith.common.errors import ConfigError
from megalith.data.corpus.bpe import train_bpe
from megalith.data.tokenizers.tokenizer import build_tokenizer

TEXTS = ["the cat sat on the mat, the cat", "def f(x):\n    return x + 1\n", "Ünïcödé 猫 🙂"] * 5


def test_train(tmp_path):
    assert train_bpe(iter(TEXTS), 290, tmp_path / "a.json") == 290
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "a.json"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (290, 289)
    for text in [*TEXTS, "\x00 any bytes at all \x7f ÿ"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the cat")) < len("the cat")


def test_same_texts_same_file(tmp_path):
    for name in "ab":
        train_bpe(TEXTS, 300, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_little_text_gives_fewer_tokens_and_impossible_sizes_are_refused(tmp_path):
    assert train_bpe(["ab"], 5000, tmp_path / "a") < 300
    with pytest.raises(ConfigError, match="--vocab-size"):
        train_bpe(TEXTS, 256, tmp_path / "a")
    assert train_bpe(TEXTS, 258, tmp_path / "b", special_tokens=("<s>", "</s>")) == 258
