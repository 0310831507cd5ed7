"""save_state and load_state: every layout resumes what another saved; what is kept, what is refused, what is told."""

import json
import pathlib
import random
import re
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import ProjectConfiguration
from torch.optim.lr_scheduler import LambdaLR

import megalith
from megalith import checkpoint
from megalith.checkpoint import weights as own_format
from megalith.checkpoint.formats import FORMATS, MegatronOptions
from megalith.checkpoint.store import saving
from megalith.common.errors import CheckpointError, ConfigError, TrainingError
from megalith.config.run import RunConfig
from megalith.integrations.accelerate.saving import checkpoints
from megalith.runtime.load import weights_of
from megalith.testing.ranks import run_ranks
from megalith.training.resume.source import infer_finetune
from megalith.workflows.conversion import convert
from tests.integrations.accelerate.helpers import accelerating, toy_model
from tests.integrations.accelerate.prepared import LAYOUTS, accelerator_of, prepare, processes, train, whole_weights


def scheduled(accelerator: Any) -> LambdaLR:
    """A scheduler of torch, as prepared."""
    scheduler = LambdaLR(accelerator.session.optimizer.optimizer, lambda step: 1.0 / (1.0 + step))
    accelerator._schedulers.append(scheduler)
    return scheduler


def saved(kind: str, layout: str, folder: str) -> list[float]:
    """The losses of three steps after a save, of three steps."""
    with accelerator_of((toy_model(kind), layout)) as accelerator:
        scheduler = scheduled(accelerator)
        train(accelerator.session, 3, scheduler)
        assert checkpoints.save_state(accelerator, folder) == folder
        return train(accelerator.session, 3, scheduler)


def resumed(kind: str, layout: str, folder: str) -> list[float]:
    """The losses of three steps of another model, after it has loaded a save."""
    with accelerator_of((toy_model(kind, seed=7), layout)) as accelerator:
        session, scheduler = accelerator.session, scheduled(accelerator)
        checkpoints.load_state(accelerator, folder)
        assert (session.steps, session.consumed_samples) == (3, 24)
        assert (
            scheduler.get_last_lr() == [3e-3 / 4] * 2 and session.optimizer.optimizer.param_groups[1]["lr"] == 3e-3 / 4
        )
        return train(session, 3, scheduler)


FAST = {("gpt2", "dp2 sharded", "tp2"), ("megatron-bert", "pp2", "one")}
PAIRS = [("dp2 sharded", "tp2"), ("pp2", "one"), ("tp2", "pp2"), ("one", "tp2 pp2"), ("tp2 pp2", "dp2 pp2 sharded"),
         ("virtual", "dp2")]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        pytest.param(kind, *pair, marks=() if (kind, *pair) in FAST else pytest.mark.slow)
        for kind in ("gpt2", "llama", "megatron-bert", "t5")
        for pair in PAIRS
    ],
)
def test_any_layout_resumes_what_any_saved(kind: str, first: str, second: str, tmp_path: pathlib.Path) -> None:
    expected = run_ranks(saved, processes(first), kind, first, str(tmp_path))[0]
    for found in run_ranks(resumed, processes(second), kind, second, str(tmp_path)):
        assert found == pytest.approx(expected, rel=1e-4)
    assert checkpoint.verify(checkpoint.find(tmp_path)) == []


class Counter:
    """What a script registers."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class CountingSGD(torch.optim.SGD):
    """An optimizer that keeps a Python number, as some do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["calls"] = self.state[parameter].get("calls", 0) + 1


@pytest.mark.parametrize(
    "optimizer",
    [
        "SGD",
        "Adagrad",
        CountingSGD,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop")
        ),
    ],
)
def test_optimizers_of_all_kinds(optimizer: str | type, tmp_path: pathlib.Path) -> None:
    with accelerator_of((toy_model("gpt2"), "one", optimizer)) as accelerator:
        train(accelerator.session, 2)
        checkpoints.save_state(accelerator, tmp_path)
        expected = train(accelerator.session, 2)
    with accelerator_of((toy_model("gpt2", seed=7), "one", optimizer)) as accelerator:
        checkpoints.load_state(accelerator, tmp_path)
        if optimizer is CountingSGD:
            states = accelerator.session.optimizer.optimizer.state.values()
            assert {type(state["calls"]) for state in states} == {int} and {state["calls"] for state in states} == {2}
        assert train(accelerator.session, 2) == expected


def test_what_goes_along(tmp_path: pathlib.Path) -> None:
    """Registered objects, random states, counts, hooks; parameters that never had a gradient have no state."""
    calls, folder = [], tmp_path / "state"
    with accelerator_of((toy_model("gpt2"),)) as accelerator:
        session, counter = accelerator.session, Counter()
        accelerator.register_for_checkpointing(counter)
        accelerator.register_save_state_pre_hook(lambda models, weights, where: calls.append((weights, where)))
        session.parameters[0].requires_grad_(False)
        train(session, 1)
        counter.number, accelerator.step, session.loss_scale.scale = 5, 9, 1.0
        checkpoints.save_state(accelerator, folder)
        expected = random.random(), torch.rand(1).item()
    with accelerator_of((toy_model("gpt2", seed=7),)) as accelerator:
        session, counter = accelerator.session, Counter()
        accelerator.register_for_checkpointing(counter)
        accelerator.register_load_state_pre_hook(lambda models, where: calls.append((models, where)))
        train(session, 1)
        checkpoints.load_state(accelerator, folder)
        assert (random.random(), torch.rand(1).item()) == expected
        assert (counter.number, accelerator.step) == (5, 9)
        assert session.parameters[0] not in session.optimizer.optimizer.state
        assert session.parameters[1] in session.optimizer.optimizer.state
    assert calls == [([], str(folder))] * 2
    state = checkpoint.read_train_state(checkpoint.find(folder))
    assert state["consumed_train_samples"] == 8 and state["accelerate"]["param_groups"][0]["weight_decay"] == 0.1
    names = {path.name for path in (checkpoint.find(folder) / "accelerate").iterdir()}
    assert names == {"custom_checkpoint_0.pkl", "random_states_0.pkl"}


def test_every_verb_opens_it(tmp_path: pathlib.Path) -> None:
    model = toy_model("gpt2")
    with accelerator_of((model,)) as accelerator:
        checkpoints.save_state(accelerator, tmp_path / "state")
    loaded, ids = megalith.load(tmp_path / "state", device="cpu"), torch.arange(20).view(2, 10)
    torch.testing.assert_close(loaded(ids), model(ids).logits.detach(), rtol=1e-4, atol=1e-5)
    convert(tmp_path / "state", tmp_path / "back", to="huggingface")
    model.save_pretrained(tmp_path / "original")
    contents = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "original")]
    assert contents[0] == contents[1]
    config, line = infer_finetune(RunConfig().replace(load=str(tmp_path / "state"), run_dir=str(tmp_path / "run")))
    assert config.checkpoint.finetune and "Accelerator.save_state" in line


@pytest.mark.slow
def test_a_folder_is_written_again_and_an_interrupted_save_leaves_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def fail(*arguments: Any) -> None:
        raise OSError("No space left on device")

    with accelerator_of((toy_model("gpt2"),)) as accelerator:
        train(accelerator.session, 1)
        checkpoints.save_state(accelerator, tmp_path)
        train(accelerator.session, 1)
        with monkeypatch.context() as patch:
            patch.setattr(saving, "_write_manifest", fail)
            with pytest.raises(CheckpointError, match="No space left on device"):
                checkpoints.save_state(accelerator, tmp_path)
        assert checkpoint.iterations(tmp_path) == [1]
        checkpoints.load_state(accelerator, tmp_path)
        assert accelerator.session.steps == 1
        train(accelerator.session, 1)
        checkpoints.save_state(accelerator, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", "latest"]


def test_another_runs_checkpoint_is_moved_aside(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "state"
    own_format.write(weights_of(toy_model("gpt2")), folder)  # an imported one, of no run
    for number in range(2):
        with accelerator_of((toy_model("gpt2"),)) as accelerator:
            checkpoints.save_state(accelerator, folder)
        (aside,) = [path for path in folder.iterdir() if path.name.startswith("before-")]
        assert checkpoint.verify(checkpoint.find(aside)) == [] and checkpoint.iterations(folder) == [0]
        assert f"is in {aside} now" in capsys.readouterr().out
        aside.rename(tmp_path / f"seen {number}")


def test_automatic_names(tmp_path: pathlib.Path) -> None:
    project = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=2)
    with accelerator_of((toy_model("gpt2"),), project_config=project) as accelerator:
        for _ in range(3):
            train(accelerator.session, 1)
            folder = checkpoints.save_state(accelerator)
        assert folder == str(tmp_path / "checkpoints" / "checkpoint_2")
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_1", "checkpoint_2"]
    project = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    with accelerator_of((toy_model("gpt2", seed=7),), project_config=project) as accelerator:
        accelerator.project_configuration.iteration = 2
        with pytest.raises(CheckpointError, match="a numbered checkpoint is not replaced"):
            checkpoints.save_state(accelerator)
        (tmp_path / "checkpoints" / "checkpoint_9").mkdir()  # of a save that was killed
        checkpoints.load_state(accelerator)
        assert accelerator.session.steps == 3
        assert checkpoints.save_state(accelerator).endswith("checkpoint_3")


def other_sources(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The weights of one model as other programs write them."""
    model = toy_model("gpt2", seed=3)
    model.save_pretrained(folder / "huggingface")
    own_format.write(weights_of(model), folder / "megalith")
    megatron = FORMATS.find("megatron").write
    assert megatron is not None
    megatron(weights_of(model), folder / "megatron", MegatronOptions(tensor_model_parallel_size=2))
    with accelerating():
        plain = accelerate.Accelerator(cpu=True)
        plain.prepare(model)
        plain.save_state(folder / "accelerate")
    return {path.name: path for path in folder.iterdir()}


def test_weights_of_other_programs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    expected = {name: tensor.clone() for name, tensor in weights_of(toy_model("gpt2", seed=3)).items()}
    found = other_sources(tmp_path)
    assert found.keys() == {"huggingface", "megalith", "megatron", "accelerate"}
    with accelerator_of((toy_model("gpt2"),)) as accelerator:
        session = accelerator.session
        for path in found.values():
            train(session, 1)
            checkpoints.load_state(accelerator, path)
            for name, tensor in whole_weights(session).items():
                torch.testing.assert_close(tensor, expected[f"model/{name}"], rtol=0, atol=0)
            assert not session.optimizer.optimizer.state
            line = (
                f"megalith: {path}: the weights alone are loaded, as save_state did not write it; the optimizer begins"
            )
            assert line in capsys.readouterr().out


@pytest.mark.slow
def test_options_of_the_plugin(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    with accelerator_of((toy_model("gpt2"),), {"no_save_optim": True}) as accelerator:
        train(accelerator.session, 1)
        checkpoints.save_state(accelerator, tmp_path / "weights", safe_serialization=False)
    assert "safe_serialization=False changes nothing" in capsys.readouterr().out
    assert set(checkpoint.describe(checkpoint.find(tmp_path / "weights"))["parameters"]) == {"model"}
    with accelerator_of((toy_model("gpt2"),)) as accelerator:
        train(accelerator.session, 1)
        checkpoints.save_state(accelerator, tmp_path / "all")
    for folder, changes in ((tmp_path / "weights", {}), (tmp_path / "all", {"no_load_optim": True})):
        with accelerator_of((toy_model("gpt2", seed=7),), changes) as accelerator:
            checkpoints.load_state(accelerator, folder)
            assert accelerator.session.steps == 1 and not accelerator.session.optimizer.optimizer.state
        assert "the optimizer begins anew" in capsys.readouterr().out
    with accelerator_of((toy_model("gpt2", seed=7), "one", None)) as accelerator:  # to evaluate
        checkpoints.load_state(accelerator, tmp_path / "all")
        assert accelerator.session.steps == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {  # what differs from the script that saved -> the message
    "another model": ({"model": {"layer_norm_epsilon": 1e-3}}, "that was prepared; found layernorm_epsilon 1e-05"),
    "another size": ({"model": {"n_layer": 2}}, "that was prepared; found num_layers 4 instead of 2"),
    "another vocabulary": ({"model": {"vocab_size": 80}}, "the checkpoint has [96, 32], asked for is [80, 32]"),
    "another optimizer": (
        {"optimizer": "SGD"},
        "must be optimizer/momentum_buffer for this optimizer; found optimizer/exp_avg, optimizer/exp_avg_sq, "
        "optimizer/step. Make the optimizer that it was saved with",
    ),
    "a scheduler": ({"scheduler": True}, "schedulers must be as many as here, 1; found 0"),
    "an object": ({"object": True}, "registered objects must be as many as here, 1; found 0"),
    "groups": ({"groups": True}, "parameter groups must be as many as here, 1; found 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_told(case: str, tmp_path: pathlib.Path) -> None:
    with accelerator_of((toy_model("gpt2"),)) as accelerator:
        train(accelerator.session, 1)
        checkpoints.save_state(accelerator, tmp_path)
    change, message = WRONG[case]
    model = toy_model("gpt2", **change.get("model", {}))
    with accelerator_of((model, "one", change.get("optimizer", "AdamW"))) as accelerator:
        if "scheduler" in change:
            scheduled(accelerator)
        if "object" in change:
            accelerator.register_for_checkpointing(Counter())
        if "groups" in change:
            optimizer = torch.optim.AdamW(accelerator.session.parameters)
            accelerator.session.optimizer.optimizer = optimizer
        with pytest.raises(CheckpointError, match=re.escape(message)):
            checkpoints.load_state(accelerator, tmp_path)


def test_what_cannot_be_is_told(tmp_path: pathlib.Path) -> None:
    with accelerator_of((toy_model("gpt2"),)) as accelerator:
        for call, message in (
            (lambda: checkpoints.save_state(accelerator), "save_state: output_dir must be given; found None"),
            (lambda: checkpoints.load_state(accelerator), "load_state: input_dir must be given; found None"),
            (lambda: checkpoints.save_state(accelerator, tmp_path, exclude_frozen=1), "has no such option"),
            (lambda: checkpoints.load_state(accelerator, tmp_path / "none"), "must be given a folder that exists"),
            (lambda: checkpoints.load_state(accelerator, tmp_path), "must be in one of the known formats"),
        ):
            with pytest.raises((ConfigError, CheckpointError), match=message):
                call()
        accelerator.session.parameters[0].data.fill_(torch.nan)
        with pytest.raises(TrainingError, match=r"must be finite numbers, .*; found model/embedding"):
            checkpoints.save_state(accelerator, tmp_path)
        assert not checkpoint.iterations(tmp_path)
        accelerator.session = None
        with pytest.raises(ConfigError, match="must have a model to save or load"):
            checkpoints.save_state(accelerator, tmp_path)


def saved_by_ranks(folder: str) -> None:
    with accelerator_of((toy_model("gpt2"), "tp2")) as accelerator:
        checkpoints.save_state(accelerator, folder)


def loaded_by_one(folder: str) -> None:
    with accelerator_of((toy_model("gpt2"),)) as accelerator:
        checkpoints.load_state(accelerator, folder)


@pytest.mark.slow
def test_random_states_of_other_processes_are_left(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    run_ranks(saved_by_ranks, 2, str(tmp_path))
    files = {path.name for path in (checkpoint.find(tmp_path) / "accelerate").iterdir()}
    assert files == {"random_states_0.pkl", "random_states_1.pkl"}
    loaded_by_one(str(tmp_path))
    assert "2 processes saved theirs, and here are 1" in capsys.readouterr().out


def test_layouts_are_what_they_say() -> None:
    with accelerating():
        assert prepare(toy_model("gpt2")).runtime.mesh.world_size == processes("one")
    assert {number for number, _ in LAYOUTS.values()} == {1, 2, 4}
