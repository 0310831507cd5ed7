"""benchmarks/same_results.py can fail: whatever may differ is seen, to the last bit, and said."""

import argparse
import importlib.util
import pathlib
import types

import pytest
import torch
from safetensors.torch import save_file

FILE = pathlib.Path(__file__).parents[1] / "benchmarks" / "same_results.py"


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("same_results", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DIFFERENT = {
    "last digit": ({"step 1: loss": "3.1", "step 2: loss": "3.01"}, {"step 1: loss": "3.1", "step 2: loss": "3.02"},
                   "step 2: loss: old 3.01, new 3.02 (1 of 2 differ)"),
    "missing": ({"step 1: loss": "3.1"}, {}, "step 1: loss: old 3.1, new nothing (1 of 1 differ)"),
    "more": ({}, {"step 1: loss": "3.1"}, "step 1: loss: old nothing, new 3.1 (1 of 1 differ)"),
    "nothing at all": ({}, {}, "neither has any result"),
    "a byte": ({"a.bin": b"ab"}, {"a.bin": b"ac"}, "a.bin: old 2 bytes b'ab', new 2 bytes b'ac' (1 of 1 differ)"),
    "an element": ({"w": torch.zeros(2, 3)}, {"w": torch.tensor([[0, 0, 0], [0, 0, 0.5]])},
                   "w: old float32 [2, 3], new float32 [2, 3] with 1 other elements, by 0.5 at most (1 of 1 differ)"),
    "a sign of zero": ({"w": torch.zeros(1)}, {"w": -torch.zeros(1)},
                       "w: old float32 [1], new float32 [1] with 0 other elements, by 0 at most (1 of 1 differ)"),
    "a dtype": ({"w": torch.zeros(1)}, {"w": torch.zeros(1, dtype=torch.int32)},
                "w: old float32 [1], new int32 [1] with 0 other elements, by 0 at most (1 of 1 differ)"),
    "a shape": ({"w": torch.zeros(2, 3)}, {"w": torch.zeros(3, 2)},
                "w: old float32 [2, 3], new float32 [3, 2] (1 of 1 differ)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_is_reported(script: types.ModuleType, name: str) -> None:
    old, new, expected = DIFFERENT[name]
    assert script.difference(old, new) == expected


def test_equal_in_every_bit(script: types.ModuleType) -> None:
    found = [{"w": torch.tensor([float("nan"), 1.0]).bfloat16(), "a": b"1", "step 1: loss": "1"} for _ in range(2)]
    assert script.difference(*found) is None


def test_every_number_of_a_run_is_compared_but_its_seconds(script: types.ModuleType, tmp_path, monkeypatch) -> None:
    lines = '{"step":1,"loss":3.917797565460205,"losses":{"lm loss":3.0},"seconds":0.2}\n'
    lines += '{"step":1,"validation_loss":NaN}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    monkeypatch.setattr(script, "trained", lambda *words: tmp_path)
    found = script.losses(None, None, "gpt-absolute", "one")
    assert found == {
        "step 1: step": "1", "step 1: loss": "3.917797565460205", "step 1: losses": "{'lm loss': '3.0'}",
        "step 1: validation_loss": "nan",
    }  # fmt: skip


def test_every_tensor_of_a_folder_is_compared(script: types.ModuleType, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "a" / "model.safetensors")
    torch.save({"model": {"w": torch.zeros(1)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text("{}")
    found = script.folder_contents(tmp_path)
    assert list(found) == ["a/model.safetensors: x", "config.json", "m.pt: model: w", "m.pt: args: lr"]
    assert found["config.json"] == b"{}" and found["m.pt: args: lr"] == "1.0"


def test_what_fails_is_a_difference(script: types.ModuleType, tmp_path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/megalith").write_text("#!/bin/sh\necho what is wrong >&2\nexit 3\n")
    (tmp_path / ".venv/bin/megalith").chmod(0o755)
    side = script.Side(tmp_path, tmp_path / "work", 1)
    found = script.compare(lambda side, source: side.run("pretrain gpt"), [side, side], [side, side])
    assert found.startswith("OLD failed: `") and found.endswith("pretrain gpt` ended with status 3: what is wrong")


def test_a_tree_that_runs_other_code_is_refused(script: types.ModuleType, tmp_path) -> None:
    with pytest.raises(SystemExit, match="it must be a source tree with its own environment"):
        script.described(tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/bin/echo")  # prints its words as if they were where megalith lies
    with pytest.raises(SystemExit, match="it must run the tree's own code"):
        script.described(tmp_path)
