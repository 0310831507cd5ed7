"""Runs with --lora-rank: only adapters change and are saved, resumed in any layout, merged and exported."""

import json
import pathlib
import re
import shutil

import pytest
import torch

import megalith
from megalith import checkpoint
from megalith.checkpoint import formats
from megalith.checkpoint.formats.adapters import merge
from megalith.common.errors import CheckpointError
from megalith.config.adapters import M, adapter_shapes, is_adapter
from megalith.config.run import RunConfig
from megalith.generation.generate import complete
from megalith.runtime.load import load_model
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from megalith.workflows.conversion import convert
from tests.tiny import losses, tiny_config, write_corpus

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    """(corpus, a run of a few steps, whose model is the base)."""
    folder = tmp_path_factory.mktemp("base")
    prefix = write_corpus(str(folder / "tiny"))
    train(tiny_config(prefix, str(folder / "run"), train_iters=3, eval_iters=0))
    return prefix, folder / "run"


def lora_config(base: tuple[str, pathlib.Path], folder: pathlib.Path, **changes) -> RunConfig:
    """A run on the base, with all kinds of dropout."""
    prefix, load = base
    values = {
        "load": str(load), "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "train_iters": STEPS,
        "eval_iters": 0, "lr": 2e-2, "lr_warmup_iters": 0, "save_interval": 3, **changes,
    }  # fmt: skip
    return tiny_config(prefix, str(folder), **values)


def stored(folder: pathlib.Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return checkpoint.read_full(checkpoint.find(folder, step))


def test_only_adapters_are_trained_and_saved_and_a_resumed_run_has_the_same_bits(base, tmp_path) -> None:
    config = lora_config(base, tmp_path / "whole")
    train(config)
    tensors, shapes = stored(tmp_path / "whole"), adapter_shapes(config.replace(vocab_size=49).model, config.lora)
    moments = {f"optimizer/{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in shapes}
    assert tensors.keys() == {f"model/{name}" for name in shapes} | moments
    assert all(bool(tensors[f"model/{name}"].any()) for name in shapes)  # B began as zeros
    state = checkpoint.read_train_state(checkpoint.find(tmp_path / "whole"))
    assert state["base"]["path"] == str(checkpoint.find(base[1])) and len(state["base"]["fingerprint"]) == 32
    train(lora_config(base, tmp_path / "parts", exit_interval=3))
    train(lora_config(base, tmp_path / "parts", load=None))  # the checkpoint names the base
    again = stored(tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_merged_and_unmerged_models_and_exports_agree(base, tmp_path) -> None:
    train(lora_config(base, tmp_path / "run", lora_dropout=0.0))
    plain = megalith.load(base[1], device="cpu")
    apart = megalith.load(tmp_path / "run", device="cpu", merge_adapter=False)
    merged = megalith.load(base[1], device="cpu", adapter=tmp_path / "run")
    assert sum(map(is_adapter, dict(apart.model.named_parameters()))) == 24 > sum(map(is_adapter, merged.state_dict()))
    for target in ("huggingface", "megatron", "megalith", "peft"):
        convert(tmp_path / "run", tmp_path / target, to=target)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["rank_pattern"] == {"c_attn": 12}
    models = [merged, *(megalith.load(tmp_path / target, device="cpu") for target in ("huggingface", "megalith"))]
    models += [megalith.load(tmp_path / "peft", device="cpu", merge_adapter=False)]
    models += [megalith.load(apart, device="cpu", merge_adapter=flag) for flag in (False, True)]  # a model in memory
    ids = torch.arange(22).view(2, 11)
    for model in models:
        torch.testing.assert_close(model(ids), apart(ids), rtol=0, atol=1e-5)
    assert not torch.allclose(plain(ids), apart(ids), rtol=0, atol=1e-2)
    prompts = [[3, 4, 5], [40]]
    texts = [[each.ids for each in complete(m, prompts, max_new_tokens=12, temperature=0.0)] for m in (apart, merged)]
    assert texts[0] == texts[1] != [each.ids for each in complete(plain, prompts, max_new_tokens=12, temperature=0.0)]


def test_dora_begins_as_its_base_and_is_resumed_and_merged(base, tmp_path) -> None:
    changes = {"lora_dropout": 0.0, "train_iters": 4, "save_interval": 2, "use_dora": True}
    train(lora_config(base, tmp_path / "lora", lora_dropout=0.0, train_iters=1))
    train(lora_config(base, tmp_path / "run", **changes))
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(tmp_path / "lora")[0], rel=1e-6)
    tensors, before = stored(tmp_path / "run"), stored(base[1])
    for name, magnitude in tensors.items():
        if name.startswith("model/") and name.endswith(M):
            lengths = before[name.replace(M, ".weight")].norm(dim=1)
            assert torch.allclose(magnitude, lengths, rtol=0, atol=0.1) and not torch.equal(magnitude, lengths)
    train(lora_config(base, tmp_path / "parts", exit_interval=2, **changes))
    with pytest.raises(CheckpointError, match=r"--lora-rank 4 --lora-alpha 8 --use-dora; found no --use-dora. Give"):
        train(lora_config(base, tmp_path / "parts", **{**changes, "use_dora": False}))
    train(lora_config(base, tmp_path / "parts", **changes))
    again = stored(tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "run")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    apart, merged = (megalith.load(tmp_path / "run", device="cpu", merge_adapter=flag) for flag in (False, True))
    ids = torch.arange(22).view(2, 11)
    torch.testing.assert_close(merged(ids), apart(ids), rtol=0, atol=1e-5)


def test_a_base_that_is_missing_or_differs_is_named(base, tmp_path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base[1], copy)
    config = lora_config((base[0], copy), tmp_path / "run")
    train(config.replace(exit_interval=2))
    copy.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"the base must be on this machine.*Name the base too: --load BASE"):
        formats.read(tmp_path / "run")
    moved = merge(formats.read(tmp_path / "moved", None, {"adapter": tmp_path / "run"}))
    assert not any(map(is_adapter, moved))
    train(config.replace(load=str(tmp_path / "moved"), exit_interval=4))
    train(tiny_config(base[0], str(tmp_path / "other"), train_iters=1, lr_warmup_iters=0, eval_iters=0, seed=7))
    with pytest.raises(CheckpointError, match=r"base of adapters must have the weights that the adapters .* --load"):
        train(config.replace(load=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0, "lora_alpha": None, "lora_dropout": 0.0}, r"must be resumed with the flags of its adapters"),
        ({"lora_alpha": None}, r"--lora-rank 4 --lora-alpha 8; found no --lora-alpha\. Give"),
        ({"lora_rank": 2}, r"LoRA's flags must be those of the adapters .*: --lora-rank 4 --lora-alpha 8"),
        ({"lora_target_modules": ["q"]}, r"no --lora-target-modules; found --lora-target-modules q. Give these"),
    ],
)
def test_a_run_is_resumed_with_its_own_adapters(base, tmp_path, changes: dict, message: str) -> None:
    train(lora_config(base, tmp_path, train_iters=1))
    with pytest.raises(CheckpointError, match=message):
        train(lora_config(base, tmp_path, **{"load": None, **changes}))


def test_a_run_is_measured_with_its_own_adapters(base, tmp_path, capsys) -> None:
    """With --skip-train beside the flags of the run, which name the base too; its merged model has the same loss."""
    train(lora_config(base, tmp_path / "run"))
    convert(tmp_path / "run", tmp_path / "merged", to="megalith")
    measured, only = [], {"skip_train": True, "eval_iters": 2}
    merged = tiny_config(base[0], str(tmp_path / "other"), load=str(tmp_path / "merged"), **only)
    for config in (lora_config(base, tmp_path / "run", **only), merged):
        capsys.readouterr()
        train(config)
        measured.append([float(each) for each in re.findall(r"lm loss value: (\S+)", capsys.readouterr().out)])
    # Of the test data, which both begin at their first sample; validation goes on where the step of a run leaves it.
    assert measured[0][-1] == pytest.approx(measured[1][-1], rel=1e-5)


def test_lora_needs_a_base_and_a_folder_of_its_own(base, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"--load must name the model that the adapters are trained on"):
        train(lora_config(base, tmp_path, load=None))
    shutil.copytree(base[1], tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"must be of a LoRA run to resume with --lora-rank; found a whole model"):
        train(lora_config(base, tmp_path / "full", load=None))


def test_adapters_of_another_run_or_of_peft_are_a_start(base, tmp_path) -> None:
    train(lora_config(base, tmp_path / "first", train_iters=2))
    train(lora_config(base, tmp_path / "second", train_iters=1))
    convert(tmp_path / "first", tmp_path / "peft", to="peft")
    expected = stored(tmp_path / "first")
    for name, changes in {
        "adapter": {"adapter": str(tmp_path / "first")}, "peft": {"adapter": str(tmp_path / "peft")},
        "load": {"load": str(tmp_path / "first"), "finetune": True},
        "both": {"load": str(tmp_path / "second"), "adapter": str(tmp_path / "first")},
    }.items():  # fmt: skip
        train(lora_config(base, tmp_path / name, train_iters=1, lr=0.0, **changes))
        found = stored(tmp_path / name)
        for each in filter(is_adapter, expected):
            if each.startswith("model/"):
                assert torch.equal(found[each], expected[each]), each
    merged, _, _ = load_model(tmp_path / "peft", device="cpu")
    assert not any(map(is_adapter, merged.state_dict()))


def resume(config: RunConfig) -> None:
    """A run on the ranks of a pool."""
    train(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"data_parallel_sharding": "full"}),
        (2, {"pipeline_model_parallel_size": 2, "micro_batch_size": 4}),
        (4, {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True, "bf16": True}),
        (2, {"context_parallel_size": 2}),
    ],
)
def test_resumed_in_another_layout(base, tmp_path, size: int, layout: dict) -> None:
    """One process, then the layout, then one process: the losses of one process throughout, and one export."""
    loose = 2e-2 if "bf16" in layout else 1e-4
    train(lora_config(base, tmp_path / "whole"))
    train(lora_config(base, tmp_path / "run", exit_interval=2))
    run_ranks(resume, size, lora_config(base, tmp_path / "run", exit_interval=4, **layout), timeout=600)
    train(lora_config(base, tmp_path / "run"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=loose)
    apart, merged = (megalith.load(tmp_path / "run", device="cpu", merge_adapter=flag) for flag in (False, True))
    ids = torch.arange(22).view(2, 11)
    torch.testing.assert_close(merged(ids), apart(ids), rtol=0, atol=1e-5)
