"""Every tokenizer as files of transformers: AutoTokenizer gives the ids of preprocessing, for generated texts too."""

import base64
import json
import pathlib

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from megalith.common.errors import DataError
from megalith.config.architectures import architecture
from megalith.data.tokenizers.export import transformers_files
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from tests.data.tokenizers.vocabularies import SHARED, TEXTS, bert, gpt2, needs_shared, sentencepiece, trained_bpe_json

WORDS = (
    "<s>", "</s>", "<unk>", "<pad>", "[SEP]", "[CLS]", "<|endoftext|>", "<extra_id_1>", "<MASK>", "the", " ", "  ",
    "don't", "12", "\n", "\u00e9", "\ufb01",
)  # fmt: skip
SPOKEN = st.one_of(TEXTS, st.lists(st.sampled_from(WORDS)).map("".join))


def tik(folder: pathlib.Path) -> Tokenizer:
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"th", b"the", b" the", b"\xc3\xa9", b"12", b"  "]
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": ""} for i, token in enumerate(tokens)
    ]
    (folder / "tik.json").write_text(json.dumps(entries))
    special = ("<unk>", "<s>", "</s>", "<pad>")
    return build_tokenizer(
        "TikTokenizer",
        tokenizer_model=str(folder / "tik.json"),
        vocab_size=10 + len(tokens),
        tiktoken_num_special_tokens=10,
        tiktoken_special_tokens=special,
    )


def letters(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer.json of the report: bos 1, eos 2, pad 3, a template with BOS, no added tokens."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {c: 4 + i for i, c in enumerate("theTHE12 <>/s")}, []
        )
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer.json"))


MAKERS = {
    "gpt2": lambda folder: gpt2(vocab_extra_ids=3),
    "bert": lambda folder: bert(vocab_extra_ids=3),
    "bert cased": lambda folder: bert("Case", "cased"),
    "llama": lambda folder: sentencepiece("Llama2Tokenizer"),
    "llama bpe": lambda folder: sentencepiece("Llama2Tokenizer", "blingfire_bpe_10k"),
    "pieces": lambda folder: sentencepiece("GPTSentencePieceTokenizer", "xlnet_spiece_32k"),
    "pieces bpe": lambda folder: sentencepiece("SentencePieceTokenizer", "blingfire_bpe_10k", vocab_extra_ids=2),
    "pieces t5": lambda folder: sentencepiece("SentencePieceTokenizer", vocab_extra_ids=2),
    "tiktoken": tik,
    "letters": letters,
    "own": lambda folder: build_tokenizer(
        "HuggingFaceTokenizer", tokenizer_model=trained_bpe_json(folder), vocab_extra_ids=2
    ),
    "own deepspeed": lambda folder: build_tokenizer("HFTokenizer", tokenizer_model=trained_bpe_json(folder)),
    "own configured": lambda folder: build_tokenizer(
        "HuggingFaceTokenizer", tokenizer_model=trained_bpe_json(folder, eos_token="the")
    ),
    "two files": lambda folder: build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(SHARED / "gpt2")),
}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request, tmp_path_factory):
    """A tokenizer, and that of transformers of its exported files, in the folder of a model."""
    if not SHARED.exists() and request.param not in ("tiktoken", "letters", "own", "own deepspeed", "own configured"):
        pytest.skip("needs the vocabularies of ../shared/data, which are not part of the project")
    folder = tmp_path_factory.mktemp("words")
    tokenizer = MAKERS[request.param](folder)
    return tokenizer, auto_tokenizer(tokenizer, tmp_path_factory.mktemp("model"))


def auto_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path, family: str = "gpt2", model_type: str = "gpt"):
    model = architecture(model_type)
    for name, content in transformers_files(tokenizer, causal=model.causal, decoder=model.decoder).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(SPOKEN, min_size=1, max_size=4))
def test_any_text_has_the_same_ids(pair, texts: list[str]) -> None:
    tokenizer, reference = pair
    assert reference(texts).input_ids == [tokenizer.encode(text) for text in texts]


def test_special_tokens_have_their_names_and_ids(pair) -> None:
    tokenizer, reference = pair
    found = {name: getattr(reference, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
    assert found == {name: getattr(tokenizer, name) for name in found} | {"eos": tokenizer.eod}
    assert len(reference) <= tokenizer.vocab_size
    ids = list(tokenizer.encode("the text"))
    assert (
        reference.decode([*ids, tokenizer.eod], skip_special_tokens=True).split()
        == reference.decode(ids, skip_special_tokens=True).split()
    )


def test_numbers(tmp_path: pathlib.Path) -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    reference = auto_tokenizer(tokenizer, tmp_path, "gpt_neox")
    texts = ["1 2 3", "", " 99  100\n0", "007 00 5"]
    assert reference(texts).input_ids == [tokenizer.encode(text) for text in texts] and reference.eos_token_id == 100
    assert reference.decode([5, 99]) == "5 99"


@pytest.mark.slow
@needs_shared
def test_every_family_of_models(tmp_path: pathlib.Path) -> None:
    """The class of a model's family does not rebuild what the file says."""
    tokenizer = sentencepiece("Llama2Tokenizer")
    for family in ("gpt2", "llama", "mistral", "qwen3", "bloom", "falcon", "gpt_neox", "gemma", "t5", "mt5", "bert"):
        (tmp_path / family).mkdir()
        assert auto_tokenizer(tokenizer, tmp_path / family, family)(["Hello  you", "</s>"]).input_ids == [
            tokenizer.encode(t) for t in ("Hello  you", "</s>")
        ]


@needs_shared
def test_a_bert_has_what_training_puts_round_a_text(tmp_path: pathlib.Path) -> None:
    tokenizer = bert()
    reference = auto_tokenizer(tokenizer, tmp_path, "bert", "bert")
    assert reference("Hello you").input_ids == [tokenizer.cls, *tokenizer.encode("Hello you"), tokenizer.sep]
    pair = reference("Hello", "you")
    assert pair.input_ids == [
        tokenizer.cls,
        *tokenizer.encode("Hello"),
        tokenizer.sep,
        *tokenizer.encode("you"),
        tokenizer.sep,
    ]
    assert reference("Hello you", add_special_tokens=False).input_ids == tokenizer.encode("Hello you")


@needs_shared
def test_a_t5_ends_with_its_eos(tmp_path: pathlib.Path) -> None:
    tokenizer = sentencepiece("SentencePieceTokenizer", vocab_extra_ids=2)
    assert auto_tokenizer(tokenizer, tmp_path, "t5", "t5").eos_token_id == tokenizer.eos != tokenizer.eod


def test_what_cannot_be_written_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = letters(tmp_path)
    monkeypatch.setattr(tokenizer, "encode", lambda text: [7])
    with pytest.raises(
        DataError, match=r"The ids of tokenizer\.json must be those of HuggingFaceTokenizer; found .* where it gives"
    ):
        transformers_files(tokenizer)
    with pytest.raises(DataError, match="must have a form that the library tokenizers knows"):
        Tokenizer(tokenizer.options).to_huggingface()
