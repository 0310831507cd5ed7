"""Conversions end to end, and what --verify lets pass."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import megalith
from megalith.checkpoint.formats import read
from megalith.common.errors import CheckpointError, ConfigError
from megalith.workflows import conversion
from tests.originals.families import MODELS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def theirs(tmp_path: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    MODELS["llama, groups, tied"]().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_verify_sees_what_is_wrong(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    conversion.convert(theirs, tmp_path / "ours", to="megalith")
    assert conversion.verify(theirs, tmp_path / "ours") < 1e-5
    state = load_file(theirs / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**state, name: state[name].flip(0)}, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"relative difference of logits must be at most 0.0001 of .*; found 0\.\d+\. These"
    ):
        conversion.verify(theirs, tmp_path / "ours")


def test_verify_takes_the_class_of_the_family_and_reports_what_transformers_cannot(
    theirs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    conversion.convert(theirs, tmp_path / "ours", to="megalith")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"architectures": ["MyLlama"]}))
    assert conversion.verify(theirs, tmp_path / "ours") < 1e-5
    (theirs / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(
        ConfigError,
        match=r"--verify: transformers .* must open .* as LlamaForCausalLM; found .*Error: (.|\n)*Correct what",
    ):
        conversion.verify(theirs, tmp_path / "ours")


def test_dtype_and_targets(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    conversion.convert(theirs, tmp_path / "ours", to="megalith", options=dict(dtype="bfloat16"))
    assert {lazy.dtype for lazy in read(tmp_path / "ours").tensors.values()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="a converted checkpoint goes into a new folder"):
        conversion.convert(theirs, tmp_path / "ours", to="megalith")


def test_a_read_only_format_names_those_that_are_written(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ConfigError, match=r"only read; found 'torch_dist'. Write --to megalith, peft, huggingface, megatron\b(?!,)"
    ):
        conversion.convert(theirs, tmp_path / "ours", to="torch_dist")


SHAPE = {  # 1.3e9 parameters in bfloat16, 2.6 GB
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 25,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
MEASURE = """
import pathlib, sys
from megalith.cli.main import main
status = main(["checkpoint", *sys.argv[1:]])
# Not getrusage: a process begins with the peak of the one that started it, here of all tests before.
print("peak", 1024 * int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]))
sys.exit(status)
"""


def make_large(folder: pathlib.Path) -> int:
    """A Llama of 1.3e9 random parameters, written shard by shard; its bytes."""
    import json

    config = transformers.LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    table, total, shard, number = {}, 0, {}, 0
    for position, (name, tensor) in enumerate(state.items(), 1):
        shard[name] = torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02
        if sum(each.nbytes for each in shard.values()) > 400e6 or position == len(state):
            number += 1
            save_file(shard, folder / f"model-{number:05}.safetensors")
            table |= dict.fromkeys(shard, f"model-{number:05}.safetensors")
            total, shard = total + sum(each.nbytes for each in shard.values()), {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return total


def copy_time(folder: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds to read the bytes and write them durably, with the checksum that every checkpoint has."""
    import hashlib

    start = time.perf_counter()
    with open(target, "wb") as out:
        for file in sorted(folder.glob("*.safetensors")):
            with open(file, "rb") as source:
                digest = hashlib.sha256()
                while piece := source.read(1 << 24):
                    digest.update(piece)
                    out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    target.unlink()
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc, which only Linux has")
def test_a_large_model_needs_little_memory(tmp_path: pathlib.Path) -> None:
    """Peak memory of the importing process, Python and torch included, is under 2 GB for 2.6 GB of weights.

    Times are printed.
    """
    (tmp_path / "theirs").mkdir()
    total = make_large(tmp_path / "theirs")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for verb, source, target, more in (
        ("import", "theirs", "ours", ()),
        ("export", "ours", "back", ("--to", "huggingface", "--max-shard-size", "500MB")),
    ):
        start = time.perf_counter()
        command = [sys.executable, "-c", MEASURE, verb, str(tmp_path / source), str(tmp_path / target), *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        took = time.perf_counter() - start
        assert done.returncode == 0, done.stderr
        peak = int(re.search(r"peak (\d+)", done.stdout)[1])
        plain = copy_time(tmp_path / "theirs", tmp_path / "copied")
        print(
            f"{verb}: {total / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {took:.1f} s; copying with checksums "
            f"{plain:.1f} s"
        )
        assert peak < 2e9


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, groups, tied", "qwen2"])
def test_the_way_through_megatron_equals_the_direct_one(name: str, tmp_path: pathlib.Path) -> None:
    """Hugging Face -> megalith -> Megatron tp2 pp3 -> megalith -> Hugging Face, bit for bit; all open."""
    torch.manual_seed(0)
    original = MODELS[name]()
    original.save_pretrained(tmp_path / "theirs")
    layout = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, overrides={"vocab_size": 97})
    for source, target, to in (
        ("theirs", "a", "megalith"),
        ("a", "b", "megatron"),
        ("b", "c", "megalith"),
        ("c", "d", "huggingface"),
    ):
        conversion.convert(tmp_path / source, tmp_path / target, to=to, options=layout)
    before, after = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "d/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ids = torch.randint(97, (1, 9))
    logits = original.eval()(ids).logits
    for station in ("theirs", "a", "c", "d"):
        assert (megalith.load(tmp_path / station, device="cpu")(ids) - logits).abs().max() < 1e-5, station
    padded = megalith.load(tmp_path / "b", device="cpu")(ids)  # Megatron's files know the padded vocabulary alone
    assert (padded[..., :97] - logits).abs().max() < 1e-5
    assert conversion.verify(tmp_path / "b", tmp_path / "c") < 1e-5  # neither is a Hugging Face folder: one is made
