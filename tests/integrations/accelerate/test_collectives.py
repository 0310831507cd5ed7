"""Collectives count copies once, barriers wait, in one process and in tensor- and pipeline-parallel layouts."""

import pathlib
import time
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from megalith.accelerate import Accelerator, utils
from megalith.common.errors import ConfigError, TrainingError
from megalith.integrations.accelerate import collectives
from megalith.testing import run_ranks
from tests.integrations.accelerate.helpers import accelerating

LAYOUTS = [(1, {}), (4, {"tp_degree": 2}), (4, {"pp_degree": 2})]


def started(**layout: Any) -> Accelerator:
    return Accelerator(megatron_lm_plugin=utils.MegatronLMPlugin(**layout))


def collected(layout: dict[str, Any]) -> dict[str, Any]:
    """What the collectives give a process, made from its data-parallel rank."""
    with accelerating():
        accelerator = started(**layout)
        rank = accelerator.data_parallel_rank
        number = torch.tensor(float(rank))
        row = torch.full((rank + 1, 2), rank)
        found = {
            "gather": accelerator.gather({"a": torch.tensor([[rank, 9]]), "b": (number,)}),
            "flags": accelerator.gather(torch.tensor([True, rank == 0])),
            "groups": utils.gather_across_data_parallel_groups([number]),
            "averages": utils.avg_losses_across_data_parallel_group([number, torch.tensor([2.0 * rank])]),
            "sum": accelerator.reduce([torch.tensor([rank, 1])]),
            "mean": utils.reduce(torch.tensor([rank])),
            "max": accelerator.reduce(number, "max", scale=3.0),
            "none": accelerator.reduce(number, "none"),
            "padded": accelerator.gather(accelerator.pad_across_processes(row, pad_index=-1)),
            "padded first": utils.pad_across_processes([row], pad_first=True)[0],
            "other dim": accelerator.pad_across_processes(row, dim=5),
            "objects": accelerator.gather_for_metrics([f"text {rank}"]),
            "flagged": utils.gather_object([rank]),
        }
        given = {"words": ["A", "B", "C"], "numbers": torch.arange(3)}
        with accelerator.split_between_processes(given) as part:
            found["part"] = part
        with accelerator.split_between_processes(torch.arange(3), apply_padding=True) as part:
            found["padded part"] = part
        assert len(given["words"]) == 3  # Accelerate's would have changed it
        if accelerator.process_index == 1:
            accelerator.set_trigger()
        found["triggers"] = [accelerator.check_trigger(), accelerator.check_trigger()]
        found["rank"] = rank
        return found


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=["one", "tp2 dp2", "pp2 dp2"])
def test_data_parallel_processes_are_counted_once(world: int, layout: dict[str, Any]) -> None:
    size = 1 if world == 1 else 2
    for found in run_ranks(collected, world, layout):
        rank = found["rank"]
        assert found["gather"]["a"].tolist() == [[0, 9], [1, 9]][:size]
        assert found["gather"]["b"][0].tolist() == found["groups"][0].tolist() == [0.0, 1.0][:size]
        assert found["flags"].tolist() == [True, True, True, False][: 2 * size]
        assert found["averages"].tolist() == ([0.5, 1.0] if size == 2 else [0.0, 0.0])
        assert found["sum"][0].tolist() == [size - 1, size]
        assert found["mean"].tolist() == [(size - 1) / 2]
        assert found["max"] == 3.0 * (size - 1) and found["none"] == rank
        assert found["padded"].tolist() == ([[0, 0], [-1, -1], [1, 1], [1, 1]] if size == 2 else [[0, 0]])
        assert found["padded first"].tolist() == [[0, 0], [rank, rank]][2 - size - rank :][-size:]
        assert found["other dim"].shape == (rank + 1, 2)
        assert found["objects"] == ["text 0", "text 1"][:size] and found["flagged"] == [0, 1][:size]
        expected = [["A", "B", "C"]] if size == 1 else [["A", "B"], ["C"]]
        assert found["part"]["words"] == expected[rank]
        assert found["part"]["numbers"].tolist() == [0, 1, 2][rank * 2 :][: len(expected[rank])]
        assert found["padded part"].tolist() == ([0, 1, 2] if size == 1 else [[0, 1], [2, 2]][rank])
        assert found["triggers"] == [world > 1, False]


def ordered(folder: str) -> list[bool]:
    """Whether what one process wrote late is there for the others, after a barrier and after `main_process_first`."""
    file, late = pathlib.Path(folder) / "main", pathlib.Path(folder) / "late"
    with accelerating():
        accelerator = started(tp_degree=2)
        with accelerator.main_process_first():
            first = file.exists()
            if accelerator.is_main_process:
                time.sleep(0.2)
                file.touch()
        if accelerator.process_index == 0:
            time.sleep(0.2)
            late.touch()
        utils.wait_for_everyone()  # Accelerate's own function
        seen = [first, late.exists()]
        late.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        if PartialState().is_main_process:
            time.sleep(0.2)
            late.touch()
        accelerator.state.wait_for_everyone()
        return [*seen, late.exists()]


def test_barriers_wait(tmp_path: pathlib.Path) -> None:
    assert run_ranks(ordered, 2, str(tmp_path)) == [[True, True, True], [False, True, True]]  # the main one is the last


def failing(name: str) -> str:
    """The error of a main process leaves the others free to go on."""
    with accelerating():
        accelerator = started(tp_degree=2)
        try:
            with getattr(accelerator, name)():
                if accelerator.is_main_process:
                    raise OSError("no space left")
        except OSError as error:
            return str(error)
        return "went on"


@pytest.mark.parametrize("name", ["main_process_first", "local_main_process_first"])
def test_an_error_of_the_first_process_keeps_nobody_waiting(name: str) -> None:
    assert run_ranks(failing, 2, name, timeout=30) == ["went on", "no space left"]


def test_names_without_an_accelerator() -> None:
    with accelerating():
        assert collectives.current_mesh() is None
        with pytest.raises(TrainingError, match=r"needs an Accelerator with a MegatronLMPlugin; .*Make one first"):
            utils.avg_losses_across_data_parallel_group([torch.tensor(1.0)])
        Accelerator()  # Accelerate's own, whose functions they then are
        assert utils.gather(torch.tensor(1.0)) == 1.0 and utils.reduce(torch.tensor(2.0)) == 2.0
        assert utils.pad_across_processes(torch.ones(2)).tolist() == [1.0, 1.0] and utils.gather_object(["a"]) == ["a"]


def test_wrong_arguments() -> None:
    with accelerating():
        accelerator = started()
        with pytest.raises(ConfigError, match="reduction must be one of sum, mean, max, none; found 'average'"):
            accelerator.reduce(torch.ones(1), "average")
        with pytest.raises(TypeError, match="passed to `gather`"):
            accelerator.gather({"loss": 1.0})


def mismatched() -> str:
    with accelerating(ACCELERATE_DEBUG_MODE="1"):
        accelerator = started(tp_degree=2)
        try:
            accelerator.gather(torch.ones(accelerator.data_parallel_rank + 1))
        except Exception as error:
            return str(error)
        return "nothing"


def test_debug_mode_finds_different_shapes() -> None:
    for text in run_ranks(mismatched, 4):
        assert "Process 0: [1]" in text and "Process 3: [2]" in text
