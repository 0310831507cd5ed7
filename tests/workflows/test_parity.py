"""The parity verb, as a user meets it."""

import re

import pytest

from megalith import recipes
from megalith.cli.main import main

SMALL = [
    "parity",
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "16",
    "--vocab-size",
    "67",
]
SMALL += ["--micro-batch-size", "1", "--global-batch-size", "4", "--hidden-dropout", "0.1"]


def test_a_right_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("2 processes against one")
        and "equal, bit for bit" in out
        and "\nequal: 36 gradients compared" in out
    )
    assert len([line for line in out.splitlines() if "e-1" in line and "layers." in line]) == 2


def test_a_wrong_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = "tests.workflows.test_parity:WRONG"
    assert (
        main([*SMALL, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--tensor-parallel-plan", plan]) == 1
    )
    out = capsys.readouterr().out
    assert "final_norm" in out and "WRONG" in out and "NOT equal: 36 gradients" in out


def _wrong() -> dict:
    from megalith.parallel import styles
    from megalith.parallel.plans.gpt import PLAN

    def forgets(module, parent, axis):
        twin = styles.replicated_norm(module, parent, axis)
        twin.partial_gradients = ()
        return twin

    return {**PLAN, "final_norm": forgets}


WRONG = _wrong()


def test_what_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tensor-model-parallel-size", "3"]) == 2
    assert "--tensor-model-parallel-size must divide --num-attention-heads" in capsys.readouterr().err
    assert main([*SMALL, "--processes", "16", "--global-batch-size", "16"]) == 2
    assert "must be at most 8, because one machine runs them all; found 16." in capsys.readouterr().err
    assert main([*SMALL, "--processes", "two", "--show", "0", "--tensor-model-parallel-size", "-2"]) == 2
    err = capsys.readouterr().err
    assert "--processes must be a whole number above 0; found 'two'" in err
    assert "--show must be a whole number above 0; found '0'" in err
    assert "--tensor-model-parallel-size must be at least 1; found -2" in err
    assert main([*SMALL, "--tensor-model-parallel-size", "2", "--dry-run"]) == 0
    assert "2 processes would be compared with one" in capsys.readouterr().out


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_checked_without_its_schedule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One step is run, so a run's length, warm-up and ramp-up do not matter, and none of their numbers is an error."""
    command = ["parity", "--recipe", name, "--vocab-size", "128", "--dry-run"]
    status = main(command)
    shown = capsys.readouterr()
    if status:
        assert "must be at most 8, because one machine runs them all" in shown.err
        smaller = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"]
        assert main([*command, *smaller]) == 0
    else:
        assert re.fullmatch(r"[1-8] processes would be compared with one\n", shown.out)


def test_a_config_whose_run_would_need_more(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    settings = "lr: 0.01\nmin_lr: 0.001\ntrain_samples: 1000\nlr_warmup_samples: 10\n"
    settings += "rampup_batch_size: [1, 3, 100]\nfinetune: true\n"
    (tmp_path / "run.yaml").write_text(settings)
    assert main([*SMALL, "--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert main([*(word for word in SMALL if word not in ("--vocab-size", "67")), "--dry-run"]) == 2
    assert "--vocab-size must be given, because the check makes its own data; found nothing." in capsys.readouterr().err


def test_the_layout_of_a_file_is_counted(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("parallel:\n  tensor_model_parallel_size: 4\n")
    assert main([*SMALL, "--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert "4 processes would be compared with one" in capsys.readouterr().out
    assert main([*SMALL, "--config", str(tmp_path / "nowhere.yaml"), "--dry-run"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
