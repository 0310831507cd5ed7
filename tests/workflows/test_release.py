"""NVIDIA's releases (zips without arguments or tokenizer): text, and a folder for transformers (seeds/004)."""

import json
import pathlib
import shlex
import zipfile

import pytest
import torch

import megalith
from megalith.cli.main import main
from megalith.common.errors import ConfigError
from megalith.workflows.conversion import convert
from tests.checkpoint.megatron_files import model_of, write
from tests.toy import make_corpus

GPT, BERT = "megatron_lm_345m_v0.0.zip", "megatron_bert_345m_v0.1_uncased.zip"
WORDS = "--num-attention-heads 4 --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt"


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> pathlib.Path:
    """Both zips at toy size, and the vocabularies under the names that Megatron's README has for them."""
    folder = tmp_path_factory.mktemp("releases")
    make_corpus(folder)
    for name, new in (
        ("vocab.json", "gpt2-vocab.json"),
        ("merges.txt", "gpt2-merges.txt"),
        ("vocab.txt", "bert-vocab.txt"),
    ):
        (folder / name).rename(folder / new)
    words = len((folder / "bert-vocab.txt").read_text().split("\n"))
    for name, form in (
        (GPT, {"vocab_size": 512, "openai_gelu": True}),
        (BERT, {"vocab_size": words, "model_type": "bert"}),
    ):
        config, tensors = model_of(num_layers=2, max_position_embeddings=32, **form)
        made, rows = folder / f"{name}.made", -(-config.vocab_size // 128) * 128
        tensors = {name: tensor * 0.3 for name, tensor in tensors.items()}
        write(made, config, tensors, version=0.0, year=2019, padded=rows, iteration=None)
        with zipfile.ZipFile(folder / name, "w") as archive:
            for file in sorted(made.rglob("*.*")):
                archive.write(file, file.relative_to(made))
    return folder


@pytest.fixture
def run(releases, monkeypatch, tmp_path, capsys):
    """A command in the folder of the releases; its output. `{new}` is an empty folder."""
    monkeypatch.chdir(releases)
    monkeypatch.setenv("MEGALITH_CACHE", str(releases / "cache"))
    monkeypatch.setattr("sys.stdin", None)

    def run(line: str, statuses: tuple[int, ...] = (0,)) -> str:
        status = main(shlex.split(line.format(new=tmp_path)))
        shown = capsys.readouterr()
        assert status in statuses, shown.err
        return shown.out + shown.err

    return run


def test_the_model_cards_flow(run, tmp_path) -> None:
    run(f"checkpoint import {GPT} {{new}}/345m {WORDS}")
    run(
        "generate --load {new}/345m --dtype float16 --num-samples 2 --max-new-tokens 8 --device cpu --seed 1 "
        "--out-file {new}/texts.jsonl"
    )
    texts = [
        json.loads(line)["continuation"] for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(texts) == len(set(texts)) == 2 and all(texts)
    run("checkpoint export {new}/345m {new}/hf --to huggingface --verify")
    from transformers import DataCollatorForLanguageModeling, pipeline

    theirs = pipeline("text-generation", model=str(tmp_path / "hf"))
    ours = megalith.load(tmp_path / "345m", device="cpu")
    for prompt in ("import os", "def f(x):\n    return"):
        text = theirs(prompt, max_new_tokens=10, do_sample=False)[0]["generated_text"]
        assert text == megalith.generate(ours, prompt, max_new_tokens=10, temperature=0)[0]
    unprompted = theirs.model.generate(input_ids=None, max_length=12, num_return_sequences=1, do_sample=False)
    assert (
        theirs.tokenizer.decode(unprompted[0][1:])
        == megalith.generate(ours, max_new_tokens=11, temperature=0, stop_at_eod=False)[0]
    )
    # What transformers' Trainer makes of the folder: batches by its collator, the loss that the model gives, a step of
    # AdamW.
    theirs.tokenizer.pad_token = theirs.tokenizer.eos_token
    batch = DataCollatorForLanguageModeling(theirs.tokenizer, mlm=False)(
        [theirs.tokenizer(text) for text in ("import os", "def f")]
    )
    optimizer = torch.optim.AdamW(theirs.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        losses.append(theirs.model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]


def test_the_same_of_berts_release(run, tmp_path) -> None:
    said = run(f"checkpoint import {BERT} {{new}}/bert --num-attention-heads 4 --vocab-file bert-vocab.txt")
    assert "a BertWordPieceLowerCase, as --vocab-file bert-vocab.txt is of one, without capital letters" in said
    said = run("checkpoint export {new}/bert {new}/hf --to huggingface --verify")
    assert "split_special_tokens=False" in said
    from transformers import AutoTokenizer, pipeline

    words = AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=False)
    (first, *_) = pipeline("fill-mask", model=str(tmp_path / "hf"), tokenizer=words)("import [MASK] os")
    model = megalith.load(tmp_path / "bert", device="cpu")
    ids = words("import [MASK] os")["input_ids"]
    logits = model(torch.tensor([ids]))[0]
    assert first["token"] == logits[0, ids.index(words.mask_token_id)].argmax()


def test_the_tokenizer_is_that_of_the_flags_everywhere(run, tmp_path) -> None:
    """It was used for its size alone, or not at all."""
    asked = {"checkpoint import": "ours", "checkpoint export --to huggingface": "hf"}
    for verb, name in asked.items():
        said = run(f"{verb} {GPT} {{new}}/{name} {WORDS}")
        assert (
            "tokenizer: a GPT2BPETokenizer, as --vocab-file gpt2-vocab.json, --merge-file gpt2-merges.txt is of one"
            in said
        )
    said = run(f"checkpoint import {GPT} {{new}}/bare --num-attention-heads 4")
    assert (
        "no tokenizer is converted along, and text needs one: add --tokenizer FOLDER, or --vocab-file FILE "
        "--merge-file FILE" in said
    )
    run(f"checkpoint import {GPT} {{new}}/folder --num-attention-heads 4 --tokenizer .")
    run(
        "checkpoint export {new}/bare {new}/hf-later --to huggingface --vocab-file gpt2-vocab.json --merge-file "
        "gpt2-merges.txt"
    )
    texts = set()
    text = "--prompt 'import os' --greedy --max-new-tokens 4 --device cpu --no-stream --out-file {new}/%s.jsonl"
    for name in ("ours", "hf", "folder", "hf-later"):
        run(f"generate --load {{new}}/{name} {text % name}")
        texts.add((tmp_path / f"{name}.jsonl").read_text(encoding="utf-8"))
    for number, source in enumerate(("{new}/bare " + WORDS.partition("4 ")[2], f"{GPT} {WORDS}")):
        run(f"generate --load {source} {text % number}")
        texts.add((tmp_path / f"{number}.jsonl").read_text(encoding="utf-8"))
    assert len(texts) == 1
    model = megalith.load(tmp_path / "bare", device="cpu", vocab_file="gpt2-vocab.json", merge_file="gpt2-merges.txt")
    assert model.tokenizer.vocab_size == model.config.vocab_size == 512


REFUSED = [
    (
        f"checkpoint import {GPT} {{new}}/x --num-attention-heads 4 --vocab-file gpt2-vocab.json",
        "Add --merge-file FILE",
    ),
    (
        f"checkpoint import {GPT} {{new}}/x --num-attention-heads 4 --tokenizer . --vocab-file bert-vocab.txt",
        "a model has one tokenizer",
    ),
    (
        f"checkpoint import {GPT} {{new}}/x --num-attention-heads 4 --vocab-file bert-vocab.txt",
        "and the embedding 512 rows",
    ),
    (
        f"checkpoint import {GPT} {{new}}/x --num-attention-heads 4 --vocab-file no.json --merge-file no.txt",
        "--vocab-file must name an existing file",
    ),
    (
        f"generate --load {GPT} --num-attention-heads 4",
        "has no tokenizer; text needs one. Name its folder with --tokenizer, or its files",
    ),
    (
        f"generate --load {GPT} --num-attention-heads 4 --tokenizer nowhere",
        "--tokenizer must name a file or folder that exists; found 'nowhere'",
    ),
    (
        f"generate --load {GPT} --num-attention-heads 4 --tokenizer-type GPT2BPETokeniser --tokenizer-model x",
        "unknown tokenizer",
    ),
]


@pytest.mark.parametrize(("line", "told"), REFUSED)
def test_what_makes_no_tokenizer_is_named(line, told, run, tmp_path) -> None:
    assert told in run(line, (1, 2))
    assert not list(tmp_path.iterdir())


def test_two_tokenizers_that_differ_are_named(run, tmp_path) -> None:
    run(f"checkpoint import {GPT} {{new}}/ours {WORDS}")
    words = json.loads(pathlib.Path("gpt2-vocab.json").read_text())
    first, second = (word for word, number in words.items() if number in (300, 301))
    (tmp_path / "v.json").write_text(json.dumps(words | {first: words[second], second: words[first]}))
    said = run(
        "generate --load {new}/ours --vocab-file {new}/v.json --merge-file gpt2-merges.txt --max-new-tokens 2 "
        "--device cpu"
    )
    assert "the tokenizer is the one given, whose tokens are not those of" in said
    said = run(f"checkpoint import {GPT} {{new}}/more {WORDS} --vocab-size 510")
    assert (
        "the tokenizer has 512 tokens and the embedding 510 rows: name the tokenizer that the weights were trained with"
        in said
    )
    with pytest.raises(ConfigError, match="a checkpoint of megalith, which holds all fields of its model"):
        convert(tmp_path / "ours", tmp_path / "x", to="huggingface", options=dict(overrides={"num_layers": 3}))


def test_a_folder_with_megatrons_names(run, tmp_path) -> None:
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        (tmp_path / "words" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "words" / name).write_bytes(pathlib.Path(name).read_bytes())
    run(f"checkpoint import {GPT} {{new}}/ours --num-attention-heads 4 --tokenizer {{new}}/words")
    assert megalith.load(tmp_path / "ours", device="cpu").tokenizer.options.tokenizer_type == "GPT2BPETokenizer"
    run(f"checkpoint import {BERT} {{new}}/bert --num-attention-heads 4 --vocab-file bert-vocab.txt")
    (place,) = (tmp_path / "bert").glob("iter_*")
    run(f"checkpoint import {BERT} {{new}}/again --num-attention-heads 4 --tokenizer {place}/tokenizer")
    assert megalith.load(tmp_path / "again", device="cpu").tokenizer.options.tokenizer_type == "BertWordPieceLowerCase"
