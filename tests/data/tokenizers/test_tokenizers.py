"""Tokenizers: Megatron's special ids, saving, errors."""

import base64
import json

import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.config.sections.data import DataConfig
from megalith.data.tokenizers.tokenizer import (
    build_tokenizer,
    load_tokenizer,
    padded_vocab_size,
    tokenizer_from_config,
)
from tests.data.tokenizers.vocabularies import (
    SHARED,
    bert,
    gpt2,
    needs_shared,
    sentencepiece,
    special_ids,
    trained_bpe_json,
)


@needs_shared
def test_gpt2_ids():
    tokenizer = gpt2()
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"
    assert 50256 not in tokenizer.encode("a text that says <|endoftext|> goes on")
    assert tokenizer.pad is None
    assert tokenizer.tokens()[50256] == "<|endoftext|>"


@needs_shared
def test_gpt2_sentinels_come_after_the_vocabulary():
    tokenizer = gpt2(vocab_extra_ids=2)
    assert (tokenizer.vocab_size, list(tokenizer.extra_ids)) == (50259, [50257, 50258])
    assert tokenizer.decode([15496, 50257, 50258, 995]) == "Hello<extra_id_0><extra_id_1> world"
    assert tokenizer.tokens()[50258] == "<extra_id_1>"
    assert max(tokenizer.encode("<extra_id_0>")) < 50257


@needs_shared
@pytest.mark.parametrize(("kind", "file", "size"), [("LowerCase", "uncased", 30522), ("Case", "cased", 28996)])
def test_bert_ids(kind, file, size):
    tokenizer = bert(kind, file, vocab_extra_ids=3)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.eod) == (size + 5, size, size + 1, size + 1)
    assert tokenizer.extra_ids == [size + 2, size + 3, size + 4]
    assert [tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.mask] == [101, 102, 0, 103]
    assert not {101, 102, 103, size, size + 2} & set(
        tokenizer.encode("[CLS] is [SEP] not [MASK] special [BOS] <extra_id_0>")
    )


@needs_shared
def test_bert_normalises_as_google_does():
    tokenizer = bert()
    assert tokenizer.decode(tokenizer.encode("Héllo unbelievable wörld")) == "hello unbelievable world"
    assert tokenizer.encode("x" * 200) != [100]
    assert tokenizer.encode("x" * 201) == [100]  # one [UNK]


@needs_shared
def test_sentencepiece_appends_what_the_model_lacks():
    tokenizer = sentencepiece("SentencePieceTokenizer", vocab_extra_ids=2)
    assert special_ids(tokenizer) == {
        "cls": 1000,
        "sep": 1001,
        "eod": 1002,
        "mask": 1003,
        "bos": 1,
        "eos": 2,
        "pad": 1004,
    }
    assert (tokenizer.vocab_size, tokenizer.extra_ids) == (1007, [1005, 1006])
    ids = tokenizer.encode("Hello <MASK> you <extra_id_1></s>")
    assert [i for i in ids if i >= 1000 or i == 2] == [1003, 1006, 2]
    assert tokenizer.decode(ids) == "Hello <MASK> you <extra_id_1> </s>"
    with_pad = sentencepiece("SentencePieceTokenizer", "xlnet_spiece_32k")
    assert (with_pad.pad, with_pad.vocab_size) == (5, 32004)


@needs_shared
def test_gpt_sentencepiece_and_llama2():
    plain = sentencepiece("GPTSentencePieceTokenizer")
    assert special_ids(plain) == {"eod": 2, "bos": 1, "eos": 2, "pad": None, "cls": None, "sep": None, "mask": None}
    llama = sentencepiece("Llama2Tokenizer")
    assert llama.encode("Hello") == [1, *plain.encode("Hello")]
    assert [list(row) for row in llama.encode_batch(["Hello", "you"])] == [llama.encode("Hello"), llama.encode("you")]
    assert (llama.eod, llama.vocab_size) == (2, 1000)


def test_null():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.encode("5 6  99") == [5, 6, 99]
    assert tokenizer.decode([5, 6]) == "5 6"
    assert [row.tolist() for row in tokenizer.encode_batch(["1 2", "", "3"])] == [[1, 2], [], [3]]
    for text in ("5 six", "101", "-1"):
        with pytest.raises(DataError):
            tokenizer.encode(text)


def tik_file(folder) -> str:
    entries = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": ""} for i in range(256)]
    entries += [{"rank": 256, "token_bytes": base64.b64encode(b"he").decode(), "token_str": "he"}]
    path = folder / "tik.json"
    path.write_text(json.dumps(entries))
    return str(path)


def test_tiktoken(tmp_path):
    tokenizer = build_tokenizer(
        "TikTokenizer", tokenizer_model=tik_file(tmp_path), vocab_size=267, tiktoken_num_special_tokens=10
    )
    assert tokenizer.encode("hey<s>")[:2] == [266, 10 + ord("y")]
    assert tokenizer.decode(tokenizer.encode("hey, 12 Ω")) == "hey, 12 Ω"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (1, 2, 2, None)
    assert tokenizer.tokens()[:4] == ["<unk>", "<s>", "</s>", "<SPECIAL_3>"]
    with pytest.raises(DataError, match="--vocab-size"):
        build_tokenizer(
            "TikTokenizer", tokenizer_model=tik_file(tmp_path), vocab_size=400, tiktoken_num_special_tokens=10
        )
    with pytest.raises(DataError, match="tiktoken-special-tokens"):
        build_tokenizer(
            "TikTokenizer", tokenizer_model=tik_file(tmp_path), vocab_size=267, tiktoken_special_tokens=("<s>",)
        )


def test_huggingface_file_folder_and_configuration(tmp_path):
    path = trained_bpe_json(tmp_path)
    for source in (path, str(tmp_path)):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=source)
        assert tokenizer.eod == tokenizer.eos == tokenizer.vocab_size - 1
        assert tokenizer.decode(tokenizer.encode("the cat saß")) == "the cat saß"
    assert tokenizer.bos is None
    trained_bpe_json(tmp_path, eos_token="the", bos_token={"content": "<|endoftext|>"})
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=path)
    assert tokenizer.tokens()[tokenizer.eos] == "the"
    assert tokenizer.bos == tokenizer.vocab_size - 1


def test_megatron_deepspeed_adds_missing_tokens_in_its_order(tmp_path):
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_model=trained_bpe_json(tmp_path, model_type="x"))
    size = len(tokenizer.tokens())
    assert tokenizer.tokens()[-3:] == ["[PAD]", "</s>", "<s>"] or tokenizer.eos is not None
    assert tokenizer.vocab_size == size
    assert len({tokenizer.pad, tokenizer.bos, tokenizer.eos}) == 3


def test_post_processor_is_applied(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(trained_bpe_json(tmp_path))
    end = backend.token_to_id("<|endoftext|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    expected = backend.encode("the mat").ids
    assert tokenizer.encode("the mat") == expected and expected[0] == end
    assert tokenizer.encode_batch(["the mat"])[0].tolist() == expected
    tokenizer.accelerate(["the mat"])
    assert tokenizer.encode_batch(["the mat", ""])[0].tolist() == expected


@needs_shared
def test_every_tokenizer_survives_saving(tmp_path):
    made = {
        "gpt2": gpt2(vocab_extra_ids=1),
        "bert": bert(vocab_extra_ids=4),
        "spm": sentencepiece("SentencePieceTokenizer", vocab_extra_ids=2),
        "llama": sentencepiece("Llama2Tokenizer"),
        "null": build_tokenizer("NullTokenizer", vocab_size=10),
    }
    (tmp_path / "hf").mkdir()
    made["hf"] = build_tokenizer(
        "HuggingFaceTokenizer", tokenizer_model=trained_bpe_json(tmp_path / "hf", eos_token="the"), vocab_extra_ids=2
    )
    made["hf_folder_of_gpt2"] = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(SHARED / "gpt2"))
    for name, tokenizer in made.items():
        tokenizer.save(tmp_path / "saved" / name)
        moved = (tmp_path / "saved" / name).rename(tmp_path / f"moved-{name}")
        loaded = load_tokenizer(moved)
        text = "1 2 3" if name == "null" else "Hello the <mask> wörld"
        assert type(loaded) is type(tokenizer)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert special_ids(loaded) == special_ids(tokenizer)
        assert (loaded.vocab_size, list(loaded.extra_ids)) == (tokenizer.vocab_size, list(tokenizer.extra_ids))
        assert loaded.fingerprint() == tokenizer.fingerprint(), name


def test_files_without_a_record_are_of_the_type_that_came_with_them(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    data = DataConfig(tokenizer_type="BertWordPieceCase", vocab_extra_ids=2)
    tokenizer = load_tokenizer(tmp_path, data)
    assert (tokenizer.encode("word"), tokenizer.vocab_size, list(tokenizer.extra_ids)) == ([5], 10, [8, 9])
    with pytest.raises(DataError, match="with neither"):
        load_tokenizer(tmp_path)


def test_the_size_of_the_model_is_not_the_tokenizer(tmp_path):
    path = trained_bpe_json(tmp_path)
    made = [build_tokenizer("HFTokenizer", tokenizer_model=path, vocab_size=size).fingerprint() for size in (None, 999)]
    assert made[0] == made[1]
    assert len({build_tokenizer("NullTokenizer", vocab_size=size).fingerprint() for size in (8, 9)}) == 2


@needs_shared
def test_fingerprint_tells_settings_and_files_apart():
    prints = {t.fingerprint() for t in (gpt2(), gpt2(vocab_extra_ids=1), bert(), bert("Case", "cased"), bert("Case"))}
    assert len(prints) == 5


def test_config_section(tmp_path):
    path = trained_bpe_json(tmp_path)
    tokenizer = tokenizer_from_config(
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=path, vocab_extra_ids=2)
    )
    assert len(tokenizer.extra_ids) == 2
    with pytest.raises(ConfigError, match="--tokenizer-type"):
        tokenizer_from_config(DataConfig())


def test_own_class_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "mine_lengths.py").write_text(
        "from megalith.data.tokenizers.tokenizer import Tokenizer\nclass Mine(Tokenizer):\n    vocab_size = 7\n"
        "    def encode(self, text):\n        return [len(text)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_tokenizer("mine_lengths:Mine").encode_batch(["abc"])[0].tolist() == [3]


def test_errors_name_the_flag(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    bad = str(tmp_path / "bad.json")
    cases = [
        (("GPT2BPETokenizer", {}), DataError, "--vocab-file"),
        (("GPT2BPETokenizer", {"vocab_file": bad}), DataError, "--merge-file"),
        (("GPT2BPETokenizer", {"vocab_file": bad, "merge_file": bad}), DataError, "vocab.json and merges.txt"),
        (("BertWordPieceCase", {"vocab_file": "/nowhere"}), DataError, "--vocab-file must name an existing file"),
        (("BertWordPieceCase", {"vocab_file": bad}), DataError, r"\[UNK\]"),
        (("HuggingFaceTokenizer", {}), DataError, "--tokenizer-model"),
        (("HuggingFaceTokenizer", {"tokenizer_model": bad}), DataError, "tokenizer.json"),
        (("HuggingFaceTokenizer", {"tokenizer_model": str(tmp_path)}), DataError, "with neither"),
        (("Llama2Tokenizer", {"tokenizer_model": bad}), DataError, "sentencepiece"),
        (("TikTokenizer", {"tokenizer_model": bad}), DataError, "JSON list"),
        (("NullTokenizer", {}), DataError, "--vocab-size"),
        (("GPT2BPETokeniser", {}), ConfigError, "GPT2BPETokenizer"),
        (("NullTokenizer", {"vocab": 1}), ConfigError, "vocab_size"),
    ]
    for (name, options), kind, text in cases:
        with pytest.raises(kind, match=text):
            build_tokenizer(name, **options)
    with pytest.raises(DataError, match="must have the mask token"):
        build_tokenizer("NullTokenizer", vocab_size=3).require("mask")


def test_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"^Llama2Tokenizer needs the package sentencepiece, .*'\.\[data\]'"):
        build_tokenizer("Llama2Tokenizer", tokenizer_model="x")


def test_padded_vocabulary_golden():
    expected = {
        (50257, 1): 50304,
        (50257, 2): 50432,
        (50257, 4): 50688,
        (50257, 8): 51200,
        (30522, 1): 30592,
        (28996, 1): 29056,
    }
    expected |= {(28998, 1): 29056, (32000, 1): 32000, (32000, 8): 32768}
    assert {key: padded_vocab_size(key[0], 128, key[1]) for key in expected} == expected


def test_a_bert_vocabulary_has_a_token_a_line_also_where_a_token_is_a_separator(tmp_path):
    words = ["[PAD]", "[UNK]", "\u2028", "\x85", "##\x0c", "[CLS]", "[SEP]", "[MASK]", "word"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    tokenizer = build_tokenizer("BertWordPieceCase", vocab_file=str(tmp_path / "vocab.txt"))
    assert (tokenizer.cls, tokenizer.mask, tokenizer.encode("word")) == (5, 7, [8])
