"""A small tokenizer of every type, all made from one corpus with newlines, colons, several spaces and many scripts."""

import base64
import io
import json
import pathlib
from typing import Any

import sentencepiece
import tokenizers

from megalith.data.corpus.bpe import train_bpe
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer

CORPUS = [
    "Once upon a time there was a small model, and the model wrote.",
    "Q: why?\n\nA: so.\nZürich, 東京, Ελλάδα, 😀 naïve café; once more  upon   a time.",
]
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "bytes": {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False},  # as Llama's
    "unigram": {"model_type": "unigram", "vocab_size": 60, "hard_vocab_limit": False},  # as T5's
}  # fmt: skip
SENTENCEPIECE_TYPES = ("GPTSentencePieceTokenizer", "Llama2Tokenizer", "SentencePieceTokenizer")
NAMES = [
    "GPT2BPETokenizer", "HuggingFaceTokenizer", "BertWordPieceLowerCase", "TikTokenizer", "NullTokenizer",
    *(f"{kind} {form}" for form in SENTENCEPIECE for kind in (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")),
]  # fmt: skip


def make_tokenizer(name: str, folder: pathlib.Path) -> Tokenizer:
    """The tokenizer called `name`, one of NAMES, from files made in `folder`."""
    kind, _, form = name.partition(" ")
    if form:
        return _sentencepiece(kind, form, folder)
    if kind == "BertWordPieceLowerCase":
        words = {"once", "upon", "a", "time", "model", "why", *".,:;?", *(f"##{each}" for each in "ameu")}
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]))
        return build_tokenizer(kind, vocab_file=str(folder / "vocab.txt"), vocab_extra_ids=2)
    if kind == "TikTokenizer":
        texts = [bytes([byte]) for byte in range(256)] + [b"\n\n", b":\n", b" the", "東".encode()[:2], b"ing"]
        ranks = [{"rank": rank, "token_bytes": base64.b64encode(text).decode()} for rank, text in enumerate(texts)]
        (folder / "ranks.json").write_text(json.dumps(ranks))
        return build_tokenizer(
            kind, tokenizer_model=str(folder / "ranks.json"), vocab_size=len(ranks) + 5, tiktoken_num_special_tokens=5
        )
    if kind == "NullTokenizer":
        return build_tokenizer(kind, vocab_size=50)
    train_bpe(CORPUS, 300, folder / "tokenizer.json")
    if kind == "HuggingFaceTokenizer":
        return build_tokenizer(kind, tokenizer_model=str(folder / "tokenizer.json"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))
    (folder / "vocab.json").write_text(json.dumps(backend.get_vocab(with_added_tokens=True)))
    files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    return build_tokenizer(kind, vocab_extra_ids=2, **files)


def _sentencepiece(kind: str, form: str, folder: pathlib.Path) -> Tokenizer:
    model, lines = io.BytesIO(), [line for text in CORPUS for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **SENTENCEPIECE[form]
    )
    (folder / "spm.model").write_bytes(model.getvalue())
    if kind == "HuggingFaceTokenizer":
        plain = build_tokenizer("GPTSentencePieceTokenizer", tokenizer_model=str(folder / "spm.model"))
        plain.to_huggingface().save(str(folder / "tokenizer.json"))
        return build_tokenizer(kind, tokenizer_model=str(folder / "tokenizer.json"))
    return build_tokenizer(
        kind, tokenizer_model=str(folder / "spm.model"), vocab_extra_ids=2 * (kind == "SentencePieceTokenizer")
    )
