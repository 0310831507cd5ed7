"""Pointers that git LFS and git-annex leave in place of files: named wherever a file is read."""

import pathlib
import shutil

import numpy as np
import pytest
import tokenizers

from megalith.checkpoint import formats
from megalith.checkpoint.formats.huggingface.tokenizer import tokenizer_files
from megalith.checkpoint.store import manifest
from megalith.common.errors import CheckpointError, DataError
from megalith.common.pointers import pointer, pointers_below, refuse_pointer
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.indexed.tntidx import open_indexed
from megalith.data.tokenizers.tokenizer import build_tokenizer, load_tokenizer
from megalith.generation.params import GenerationParams
from megalith.workflows.prompt_files import read_prompts

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
NAMED = r"git LFS pointer to a file of 12,345 bytes, not the file\. Fetch it: git lfs pull"


def write(path, content=LFS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "git lfs pull"),
        (LFS.replace(b"\noid", b"\next-0-foo sha256:00\noid"), "git lfs pull"),
        (b"version https://hawser.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s10--ab.bin\n", "git annex get"),
        (b"", ""),
        (b"version https://git-lfs.github.com/spec/v1\nis what a pointer begins with\n", ""),
        (LFS + b"x" * 2000, ""),
    ],
)
def test_pointer(tmp_path, content, words):
    assert words in pointer(write(tmp_path / "a", content)) and bool(pointer(tmp_path / "a")) == bool(words)
    assert pointer(tmp_path) == pointer(tmp_path / "none") == ""
    assert len(pointers_below(tmp_path)) == len(pointers_below(tmp_path / "a")) == bool(words)


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "t/tokenizer.json"},
        {"tokenizer_type": "HFTokenizer", "tokenizer_model": "t"},
        {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "t/vocab.json", "merge_file": "t/merges.txt"},
        {"tokenizer_type": "BertWordPieceCase", "vocab_file": "t/vocab.txt"},
        {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "t/tokenizer.model"},
        {"tokenizer_type": "TikTokenizer", "tokenizer_model": "t/tiktoken.json"},
    ],
)
def test_vocabularies(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "tiktoken.json"):
        write(tmp_path / "t" / name)
    with pytest.raises(DataError, match=NAMED):
        build_tokenizer(**options)
    with pytest.raises(DataError, match=NAMED):
        load_tokenizer("t")
    with pytest.raises(DataError, match=NAMED):
        tokenizer_files(pathlib.Path("t"))


def test_what_stands_beside_a_tokenizer(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json")
    with pytest.raises(DataError, match=f"tokenizer_config.json: .*{NAMED}"):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("opened", [IndexedDataset, open_indexed])
def test_datasets(tmp_path, suffix, opened):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_sequence([1, 2, 3])
        writer.end_document()
    write(tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=rf"a\{suffix}: .*{NAMED}"):
        opened(tmp_path / "a")


CONFIG = b'{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": 11}'
INDEX = b'{"metadata": {}, "weight_map": {"transformer.wte.weight": "model-00001-of-00001.safetensors"}}'


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": CONFIG, "model.safetensors": LFS},
        {"config.json": CONFIG, "pytorch_model.bin": LFS},
        {"config.json": LFS, "model.safetensors": LFS},
        {"config.json": CONFIG, "model.safetensors.index.json": INDEX, "model-00001-of-00001.safetensors": LFS},
        {"latest_checkpointed_iteration.txt": b"5", "iter_0000005/mp_rank_00/model_optim_rng.pt": LFS},
        {
            "latest": b"global_step5",
            "global_step5/mp_rank_00_model_states.pt": LFS,
            "global_step5/layer_01-model_00-model_states.pt": LFS,
        },
        {
            "metadata.json": b'{"sharded_backend": "torch_dist"}',
            ".metadata": LFS,
            "common.pt": LFS,
            "__0_0.distcp": LFS,
        },
        {"a.bin": LFS},
    ],
)
def test_checkpoints(tmp_path, files):
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(CheckpointError, match=NAMED):
        formats.read(tmp_path)


def test_own_checkpoints(tmp_path):
    write(tmp_path / "a.distcp")
    assert "git lfs pull" in manifest.compare(tmp_path, {"a.distcp": {"bytes": 12345, "sha256": "0" * 64}})[0]
    assert "damaged" in manifest.compare(tmp_path, {"a.distcp": {"bytes": len(LFS), "sha256": "0" * 64}})[0]


def test_prompts(tmp_path):
    write(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match=NAMED):
        read_prompts(None, str(tmp_path / "prompts.txt"), GenerationParams())
    shutil.copy(tmp_path / "prompts.txt", tmp_path / "b")
    with pytest.raises(DataError, match=NAMED):
        refuse_pointer(tmp_path / "b")
