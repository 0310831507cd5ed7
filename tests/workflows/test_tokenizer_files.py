"""A whole export: transformers opens what a run leaves, with the same ids, and stops where documents end."""

import json
import pathlib

import pytest
import torch
import transformers

import megalith
from megalith import checkpoint
from megalith.config.flags.loading import to_yaml
from megalith.config.run import RunConfig
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalith.runtime.build import build_model
from megalith.runtime.state import weights as weights_of
from megalith.workflows.conversion import convert
from tests.data.tokenizers.test_tokenizers_export import letters
from tests.data.tokenizers.vocabularies import bert, gpt2, needs_shared, sentencepiece

SIZES = dict(num_layers=1, hidden_size=16, num_attention_heads=2, max_position_embeddings=32, seq_length=32)
LLAMA = dict(normalization="RMSNorm", swiglu=True, position_embedding_type="rope", add_bias_linear=False)


def run(folder: pathlib.Path, tokenizer: Tokenizer, **config) -> RunConfig:
    """A checkpoint as a run leaves it, of a GPT that ends at once.

    Every position's output is the end of document's row.
    """
    tokenizer.save(folder / "saved")
    made = RunConfig().replace(**SIZES | {"vocab_size": tokenizer.vocab_size} | config)
    model = build_model(made.model, torch.device("cpu"), seed=1)
    if made.model.model_type == "gpt":
        with torch.no_grad():
            state = weights_of(model)
            state["model/final_norm.weight"].zero_()
            state["model/final_norm.bias"].copy_(v := torch.linspace(-1, 1, 16))
            state["model/embedding.weight"][tokenizer.eod] = 9 * v
    files = {f"tokenizer/{file.name}": file for file in (folder / "saved").iterdir()}
    checkpoint.save(folder / "run", 5, weights_of(model), train_state={}, config_yaml=to_yaml(made), files=files)
    return made


def exported(folder: pathlib.Path, **options) -> tuple[dict, dict, tuple[str, ...]]:
    weights = convert(folder / "run", folder / "out", to="huggingface", options=options)
    read = [json.loads((folder / "out" / name).read_text()) for name in ("config.json", "generation_config.json")]
    return read[0], read[1], weights.notes


def test_the_parts_of_a_tokenizer_are_those_of_the_config(tmp_path: pathlib.Path) -> None:
    tokenizer = letters(tmp_path)
    run(tmp_path, tokenizer)
    for content in exported(tmp_path)[:2]:
        assert [content[f"{part}_token_id"] for part in ("bos", "eos", "pad")] == [1, 2, 3]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["the 12", "", "<s>"]
    assert words(texts).input_ids == [tokenizer.encode(text) for text in texts]
    assert (words.bos_token, words.eos_token, words.pad_token) == ("<s>", "</s>", "<pad>")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompt = words("the", return_tensors="pt").input_ids
    made = theirs.generate(prompt, max_new_tokens=9, do_sample=False)
    assert made[0, prompt.shape[1] :].tolist() == [tokenizer.eod], "it stops at the end of document"
    loaded = megalith.load(tmp_path / "out", device="cpu")
    assert loaded.tokenizer.encode("the 12") == tokenizer.encode("the 12") and loaded.tokenizer.eod == tokenizer.eod


@needs_shared
@pytest.mark.parametrize("kind", ["llama", "gpt2", "null", "pieces"])
def test_every_kind_of_tokenizer(tmp_path: pathlib.Path, kind: str) -> None:
    makers = {
        "llama": lambda: sentencepiece("Llama2Tokenizer"),
        "gpt2": gpt2,
        "null": lambda: build_tokenizer("NullTokenizer", vocab_size=50),
        "pieces": lambda: sentencepiece("SentencePieceTokenizer"),
    }
    tokenizer = makers[kind]()
    run(tmp_path, tokenizer)
    config, generation, notes = exported(tmp_path)
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eod and not notes
    assert (config["bos_token_id"], config["pad_token_id"]) == (tokenizer.bos, tokenizer.pad)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["1 2 3", "4"] if kind == "null" else ["Hello  you", "a </s> b <|endoftext|>", ""]
    assert words(texts).input_ids == [tokenizer.encode(text) for text in texts] and words.eos_token_id == tokenizer.eod


@needs_shared
def test_bert_and_t5_have_other_special_tokens(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bert").mkdir()
    tokenizer = bert(vocab_extra_ids=2)
    run(tmp_path / "bert", tokenizer, model_type="bert", norm_after_residual=True)
    assert exported(tmp_path / "bert")[0]["pad_token_id"] == tokenizer.pad
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert/out")
    assert words("hello").input_ids == [tokenizer.cls, *tokenizer.encode("hello"), tokenizer.sep]
    (tmp_path / "t5").mkdir()
    tokenizer = sentencepiece("SentencePieceTokenizer", vocab_extra_ids=2)
    run(
        tmp_path / "t5",
        tokenizer,
        model_type="t5",
        decoder_num_layers=1,
        position_embedding_type="relative",
        normalization="RMSNorm",
        add_bias_linear=False,
        relu=True,
        softmax_scale=1.0,
        scale_output=True,
    )
    config, generation, _ = exported(tmp_path / "t5")
    for content in (config, generation):
        assert (content["eos_token_id"], content["pad_token_id"]) == (tokenizer.eos, tokenizer.pad)
        assert content["decoder_start_token_id"] == tokenizer.decoder_start


def test_a_tokenizer_that_does_not_fit_is_reported(tmp_path: pathlib.Path) -> None:
    """One of --tokenizer, with more tokens than the model has rows; and one that transformers cannot have."""
    run(tmp_path, build_tokenizer("NullTokenizer", vocab_size=8))
    (tmp_path / "other").mkdir()
    other = letters(tmp_path / "other")
    other.save(tmp_path / "other")
    config, _, notes = exported(tmp_path, tokenizer=tmp_path / "other")
    assert f"the tokenizer has {other.vocab_size} tokens and the embedding 9 rows" in notes[0]
    assert config["bos_token_id"] == 1


GIVEN = {  # tokenizer_config.json -> ids of bos and eos
    "no bos": ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}, 1, 2),
    "no class": ({"bos_token": "<s>", "eos_token": "</s>"}, 1, 2),
    "another class": ({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}, 1, 2),
    "a class that builds its own": (
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
        1,
        2,
    ),
    "a new eos": ({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<eos>"}, 1, 17),
    "nothing": ({}, 1, 2),
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_folder_given_to_an_export_has_the_ids_of_preprocessing(tmp_path: pathlib.Path, case: str) -> None:
    """Whatever its tokenizer_config.json says or leaves out.

    Classes of transformers build parts of tokenizer.json anew.
    """
    settings, bos, eos = GIVEN[case]
    (tmp_path / "words").mkdir()
    letters(tmp_path / "words")
    (tmp_path / "words/tokenizer_config.json").write_text(json.dumps(settings))
    ours = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "words"))
    run(tmp_path, ours)
    for config in exported(tmp_path, tokenizer=tmp_path / "words")[:2]:
        assert (config["bos_token_id"], config["eos_token_id"]) == (bos, eos)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["the 12", "", "<|endoftext|>", "</s>TH", "<s>"]
    assert words(texts).input_ids == [ours.encode(text) for text in texts]
    # A part that has a name is found in texts, too, as it was not in preprocessing where nothing named it.
    assert (words.bos_token_id, words.eos_token_id) == (None if case == "no bos" else bos, eos)
    assert len(words) == ours.vocab_size


def test_files_of_a_hugging_face_folder_go_through_as_they_are(tmp_path: pathlib.Path) -> None:
    run(tmp_path, letters(tmp_path))
    exported(tmp_path)
    settings = tmp_path / "out/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ x }}", "their": "own"}))
    convert(tmp_path / "out", tmp_path / "ours", to="megalith")
    convert(tmp_path / "ours", tmp_path / "back", to="huggingface")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_saved_tokenizer_given_to_an_import_keeps_its_type(tmp_path: pathlib.Path) -> None:
    run(tmp_path, build_tokenizer("NullTokenizer", vocab_size=29))
    vocabulary = tmp_path / "words of mine.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    build_tokenizer("BertWordPieceCase", vocab_file=str(vocabulary), vocab_extra_ids=2).save(tmp_path / "other")
    convert(tmp_path / "run", tmp_path / "ours", to="megalith", options=dict(tokenizer=tmp_path / "other"))
    tokenizer = megalith.load(tmp_path / "ours", device="cpu").tokenizer
    assert (tokenizer.encode("word"), tokenizer.vocab_size) == ([5], 10)
