"""What tokenizer.json and its configuration add to a text: as AutoTokenizer of transformers, for any vocabulary."""

import itertools
import json
import pathlib

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from megalith.cli.main import main
from megalith.common.errors import DataError
from megalith.data.indexed import IndexedDataset
from megalith.data.tokenizers.tokenizer import build_tokenizer, load_tokenizer

BOTH = [("<s>", 0), ("</s>", 1)]
PROCESSORS = {
    "none": None,
    "bos": processors.TemplateProcessing(single="<s> $A", special_tokens=BOTH[:1]),
    "bos and eos": processors.TemplateProcessing(
        single="<s>:0 $A:0 </s>:0", pair="<s> $A </s> $B:1 </s>:1", special_tokens=BOTH
    ),
    "two before": processors.TemplateProcessing(
        single="both $0", special_tokens=[{"id": "both", "ids": [0, 1], "tokens": ["<s>", "</s>"]}]
    ),
    "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    "bert": processors.BertProcessing(("</s>", 1), ("<s>", 0)),
    "byte level": processors.ByteLevel(trim_offsets=False),
    "sequence": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A", special_tokens=BOTH[:1])]
    ),
}  # fmt: skip
NAMED = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def bases() -> dict[str, tokenizers.Tokenizer]:
    """Vocabularies without the letter a, or that give it the id of a special token."""
    letters = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}, []))
    digits = tokenizers.Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1} | {str(i): i + 2 for i in range(10)}, unk_token="<s>")
    )
    digits.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pieces = tokenizers.Tokenizer(
        models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("A", -1.0), ("1", -1.5)], unk_id=1)
    )
    pieces.normalizer, pieces.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return {"letters": letters, "digits": digits, "pieces": pieces}


TEXTS = ["ACGT", "a", "", "<s>", "A</s>C", "12 3", "A1", " "]


@pytest.mark.parametrize(("base", "kind"), list(itertools.product(bases(), PROCESSORS)))
def test_ids_are_those_of_auto_tokenizer(tmp_path: pathlib.Path, base: str, kind: str) -> None:
    backend = bases()[base]
    backend.post_processor = PROCESSORS[kind]
    backend.save(str(tmp_path / "tokenizer.json"))
    for settings in (
        {}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": True, "bos_token": None, "pad_token": "<pad>", "additional_special_tokens": ["<x>", "<y>"]},
        {"unk_token": {"content": "C", "lstrip": True, "special": True, "__type": "AddedToken"}},
        {"added_tokens_decoder": {"6": {"content": "GT", "special": False}}},
    ):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMED | settings))
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
        expected = reference(TEXTS).input_ids
        assert (
            [tokenizer.encode(text) for text in TEXTS]
            == expected
            == [row.tolist() for row in tokenizer.encode_batch(TEXTS)]
        ), settings
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (
            reference.bos_token_id,
            reference.eos_token_id,
            reference.pad_token_id,
        ), settings
        assert tokenizer.vocab_size == len(reference)
        said, does = settings.get("add_bos_token"), tokenizer.bos in tokenizer.prefix
        assert any("add_bos_token" in note for note in tokenizer.notes) == (said is not None and said != does)


def test_a_class_that_may_put_tokens_round_a_text_is_told(tmp_path: pathlib.Path) -> None:
    """Classes of transformers build a post-processor where tokenizer.json has none; transformers then saves it."""
    backend = tokenizers.Tokenizer(
        models.BPE({"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3, "<mask>": 4, "A": 5, "C": 6}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizerFast"}))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    assert reference("AC").input_ids == [0, *tokenizer.encode("AC"), 1] == [0, 5, 6, 1]
    assert any(
        "names RobertaTokenizerFast, and tokenizer.json has no post_processor" in note for note in tokenizer.notes
    )
    reference.save_pretrained(tmp_path / "saved")
    saved = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "saved"))
    assert saved.encode("AC") == reference("AC").input_ids and not saved.notes


def test_the_end_of_document_comes_after_the_text(tmp_path: pathlib.Path) -> None:
    backend = bases()["letters"]
    backend.post_processor = PROCESSORS["bos"]
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "ACGT"}\n')
    words = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(tmp_path / "tokenizer.json"),
        "--append-eod",
    ]
    assert (
        main(
            ["data", "preprocess", "--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "o"), *words]
        )
        == 0
    )
    assert IndexedDataset(str(tmp_path / "o_text_document"))[0].tolist() == [0, 2, 3, 4, 5, 1]


def test_ids_that_contradict_the_vocabulary_are_refused(tmp_path: pathlib.Path) -> None:
    backend = bases()["letters"]
    wrong = {
        "<s> as id 3, where the vocabulary has <s> as 0": processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 3)]
        ),
        "<x> as id 7, where the vocabulary has <x> as None": processors.Sequence(
            [processors.BertProcessing(("</s>", 1), ("<x>", 7))]
        ),
        "the text 2 times": processors.TemplateProcessing(single="$A $A", special_tokens=[]),
    }
    for text, processor in wrong.items():
        backend.post_processor = processor
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(DataError, match=text):
            build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    backend.post_processor = None
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json must be a JSON object; found "):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))


def test_a_folder_of_two_files_keeps_its_configuration_when_saved(tmp_path: pathlib.Path) -> None:
    (tmp_path / "two").mkdir()
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "<|endoftext|>": 5}
    (tmp_path / "two/vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "two/merges.txt").write_text("#version: 0.2\na b\n")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
    }
    before = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "two"))
    assert before.encode("ab<|endoftext|>a") == [4, 5, 2], "as GPT2Tokenizer, which reads such folders"
    (tmp_path / "two/tokenizer_config.json").write_text(json.dumps(settings))
    made = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "two"))
    assert (
        made.encode("ab</s>a")
        == transformers.AutoTokenizer.from_pretrained(tmp_path / "two")("ab</s>a").input_ids
        == [0, 4, 1, 2]
    )
    assert made.fingerprint() != before.fingerprint()
    made.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("ab</s>a") == [0, 4, 1, 2]


def test_flags_of_added_tokens_are_kept(tmp_path: pathlib.Path) -> None:
    backend = bases()["letters"]
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMED | {"mask_token": "<mask>"}))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path)).encode("A <mask>C")
        == reference("A <mask>C").input_ids
    )
