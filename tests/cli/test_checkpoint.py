"""`megalith checkpoint`: pages people read, JSON programs read, exit statuses both rely on."""

import json
import subprocess
import sys
import zipfile

import pytest
import torch

from megalith import checkpoint
from megalith.cli.main import main
from tests.checkpoint import megatron_files

CONFIG = "model:\n  num_layers: 3\n  hidden_size: 4\n  num_attention_heads: 2\n  vocab_size: 6\n"


def make(folder, iteration=1, hidden=4, layers=3):
    names = {f"layers.{number}.norm.weight": (hidden,) for number in range(layers)} | {"embedding.weight": (6, hidden)}
    state = {
        f"{part}/{name}": torch.ones(shape) for part in ("model", "optimizer/exp_avg") for name, shape in names.items()
    }
    config = CONFIG.replace("hidden_size: 4", f"hidden_size: {hidden}").replace("layers: 3", f"layers: {layers}")
    return checkpoint.save(folder, iteration, state, train_state={"consumed_train_samples": 8}, config_yaml=config)


def test_inspect(tmp_path, capsys):
    make(tmp_path, 5)
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    for text in (
        "iteration   5",
        "layers.0-2.norm.weight",
        "[6, 4] float32",
        "36  (36)",
        '"consumed_train_samples": 8',
        "  hidden_size: 4",
        "ranks: 1",
    ):
        assert text in page
    assert main(["checkpoint", "inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == {"model": 36, "optimizer/exp_avg": 36} and facts["train_state"]["iteration"] == 5


def test_compare_with_a_checkpoint(tmp_path, capsys):
    make(tmp_path / "a")
    make(tmp_path / "b", hidden=8, layers=2)
    assert main(["checkpoint", "inspect", str(tmp_path / "a"), "--with", str(tmp_path / "b")]) == 1
    page = capsys.readouterr().out
    for text in (
        "hidden_size: 4 here, 8 there -> --hidden-size 4",
        "num_layers: 3 here, 2 there -> --num-layers 3",
        "[6, 4], asked for is [6, 8]",
    ):
        assert text in page
    assert main(["checkpoint", "inspect", str(tmp_path / "a"), "--with", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []


def test_compare_with_a_config(tmp_path, capsys):
    make(tmp_path / "a")
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.replace("vocab_size: 6", "swiglu: true"))
    assert main(["checkpoint", "inspect", str(tmp_path / "a"), "--with", str(file)]) == 1
    page = capsys.readouterr().out
    assert "swiglu: False here, True there" in page and "vocab_size" not in page.partition("differences")[2]
    file.write_text("model: [")
    assert main(["checkpoint", "inspect", str(tmp_path / "a"), "--with", str(file)]) == 2
    assert "cannot be read as a config" in capsys.readouterr().err


def test_verify(tmp_path, capsys):
    for iteration in (1, 2):
        path = make(tmp_path, iteration)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("complete (") == 2
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    page = capsys.readouterr().out
    assert f"{file} is damaged" in page and page.count("complete (") == 1
    assert main(["checkpoint", "verify", str(path), "--json"]) == 1
    assert list(json.loads(capsys.readouterr().out)) == [str(path)]
    assert main(["checkpoint", "verify", str(tmp_path / "absent")]) == 1
    assert "no checkpoint found" in capsys.readouterr().err
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    assert main(["checkpoint", "verify", str(tmp_path / "theirs")]) == 1
    assert "belongs to a checkpoint of another program (config.json)" in capsys.readouterr().err


def test_a_folder_of_runs_is_answered_by_their_names(tmp_path, capsys):
    make(tmp_path / "first/checkpoints", 5)
    for verb in ("inspect", "verify"):
        assert main(["checkpoint", verb, str(tmp_path)]) == 1
        assert f"is a folder of runs; name one of them: {tmp_path}/first (step 5)." in capsys.readouterr().err


def test_edit(tmp_path, capsys):
    make(tmp_path / "a")
    command = [
        "checkpoint",
        "edit",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "--drop",
        "optimizer",
        "--rename",
        "embedding=words",
        "--iteration",
        "0",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "b" / "iter_0000000")
    assert sorted(checkpoint.describe(checkpoint.find(tmp_path / "b"))["tensors"])[-1] == "model/words.weight"
    assert main(command) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "c"), "--rename", "embedding"]) == 2
    assert "OLD=NEW" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "d"), "--drop", "rng"]) == 0
    assert "--drop rng changes nothing: no random state is kept" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"], ["verify", "--help"], ["edit", "--help"]])
def test_help_shows_an_example(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint", *words])
    assert stopped.value.code == 0 and "megalith checkpoint inspect runs/gpt" in capsys.readouterr().out


def test_inspect_of_megatrons_files(tmp_path, capsys):
    """Iteration, layout, what the arguments say as a config, tensors.

    Each note says whether something is to be done.
    """
    megatron_files.release(tmp_path / "r.zip", words=60, padded=64)
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        archive.extractall(tmp_path / "theirs")
    assert main(["checkpoint", "inspect", str(tmp_path / "theirs")]) == 0
    page = capsys.readouterr().out
    for text in (
        "iteration   0\n",
        "format      megatron, tensor-parallel 1, pipeline-parallel 1\n",
        "tensors     20\n",
        "  hidden_size: 512",
    ):
        assert text in page
    notes = [line for line in page.splitlines() if line.startswith("note ")]
    assert len(notes) == 3 and all("o be done" in note for note in notes)
    assert main(["checkpoint", "inspect", str(tmp_path / "theirs"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["model"] > 0


def test_inspect_and_verify_need_no_torch(tmp_path):
    make(tmp_path)
    code = "import sys; from megalith.cli.main import main; main(['checkpoint', sys.argv[1], sys.argv[2]])"
    code += "; assert 'torch' not in sys.modules"
    for verb in ("inspect", "verify"):
        subprocess.run([sys.executable, "-c", code, verb, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
