"""The texts of single tokens add up to the text, for tokenizers of every kind."""

import pathlib

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalith.generation.prompts import Completion
from megalith.serving.openai.logprobs import prompt_scores
from megalith.serving.token_texts import TokenTexts

TEXT = "Zürich, 東京 😀 once upon"


def said(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    texts = TokenTexts(tokenizer)
    for text, raw in map(texts, ids):
        if text.startswith("bytes:"):
            assert "".join(f"\\x{byte:02x}" for byte in raw) == text.removeprefix("bytes:")
            with pytest.raises(UnicodeDecodeError):
                raw.decode()
        else:
            assert raw.decode() == text
    return b"".join(texts(token)[1] for token in ids)


def places(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    completion = Completion(prompt_ids=ids, prompt=text, prompt_logprobs=[0.0] * (len(ids) - 1))
    return [each.offset for each in prompt_scores(tokenizer, completion)]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("once upon a time there was a small model\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "model"), vocab_size=290, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "model.model"


def test_byte_level(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert said(tokenizer, ids).decode() == TEXT
    assert TokenTexts(tokenizer)(0) == ("<|endoftext|>", b"<|endoftext|>")
    assert TokenTexts(tokenizer)(tokenizer.vocab_size) == (f"token_id:{tokenizer.vocab_size}", b"")
    starts = places(tokenizer, ids, TEXT)
    assert starts[0] == 0 and starts == sorted(starts) and TEXT[starts[-1] :] == tokenizer.decode(ids[-1:])


def test_sentencepiece(sentencepiece_model):
    """Pieces with the space before them, bytes of characters that no piece has, and a BOS that no text shows."""
    tokenizer = build_tokenizer("Llama2Tokenizer", tokenizer_model=str(sentencepiece_model))
    ids = tokenizer.encode(TEXT)
    assert TokenTexts(tokenizer)(ids[0]) == ("<s>", b"<s>")
    assert said(tokenizer, ids[1:]).decode() == f" {TEXT}"
    starts = places(tokenizer, ids, TEXT)
    assert starts[:2] == [0, 0] and TEXT[starts[-1] :].strip() == tokenizer.decode(ids[-1:])


def test_bytes_named_as_sentencepiece_does(tmp_path):
    """Llama's tokenizer.json: byte fallback, ▁ for spaces, and a BOS that decoding shows."""
    names = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁once", "0"]
    made = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<0x00>")
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json"))
    ids = [0, 258, *tokenizer.encode("東")]
    assert said(tokenizer, ids).decode() == "<s> once 東"
    assert places(tokenizer, ids, " once 東"[1:])[:2] == [0, 0]


def test_numbers():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=50)
    assert said(tokenizer, [3, 12]).decode() == " 3 12" and places(tokenizer, [3, 12], "3 12") == [0, 1]
