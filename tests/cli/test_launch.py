"""megalith launch: flags before the script are its own, all after it the script's; --dry-run shows what would start."""

import io
import re
import shlex
import subprocess
import sys
import time

import pytest

from megalith.cli import launch as verb
from megalith.cli.main import main
from megalith.config.flags.text import flag
from megalith.launcher.accelerate_config import keys
from megalith.launcher.local import launch_options
from tests.launcher.files import ANSWERS, GUIDE
from tests.toy import ROOT


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a script, and no configuration in the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "s.py").touch()
    (tmp_path / "guide.yaml").write_text(GUIDE)
    return tmp_path


def dry_run(capsys, *words):
    """(what `megalith launch --dry-run` prints, what it tells)."""
    assert main(["launch", "--dry-run", *words]) == 0
    shown = capsys.readouterr()
    return shown.out.replace(sys.executable, "python"), shown.err


def test_the_guides_command(capsys):
    out, err = dry_run(capsys, "--config_file", "guide.yaml", "s.py", "--config_name", "gpt2-large", "--with_tracking")
    assert out == (
        "ACCELERATE_USE_CPU=false \\\nACCELERATE_MIXED_PRECISION=bf16 \\\nACCELERATE_USE_MEGATRON_LM=true \\\n"
        "MEGATRON_LM_TP_DEGREE=2 \\\nMEGATRON_LM_PP_DEGREE=2 \\\nMEGATRON_LM_NUM_MICRO_BATCHES=2 \\\n"
        "MEGATRON_LM_GRADIENT_CLIPPING=1.0 \\\nMEGATRON_LM_SEQUENCE_PARALLELISM=true \\\n"
        "MEGATRON_LM_USE_DISTRIBUTED_OPTIMIZER=true \\\nMEGATRON_LM_RECOMPUTE_ACTIVATIONS=true \\\n"
        "python -m torch.distributed.run --standalone --nproc-per-node 4 s.py --config_name gpt2-large "
        "--with_tracking\n"
    )
    assert err == ""


@pytest.mark.parametrize("dash", ["-", "_"])
def test_flags_override_the_file_in_both_spellings(capsys, dash):
    words = ["--config_file", "guide.yaml", "--num_processes=2", "--megatron_lm_tp_degree", "1", "--cpu"]
    words += ["--megatron_lm_sequence_parallelism", "False", "--mixed_precision", "no", "--main_process_port", "0"]
    words = [word.replace("_", dash) if word.startswith("--") else word for word in words]
    out, _ = dry_run(capsys, *words, "s.py")
    for text in (
        "USE_CPU=true", "TP_DEGREE=1", "SEQUENCE_PARALLELISM=false", "PRECISION=no", "node 2 s.py", "PP_DEGREE=2"
    ):  # fmt: skip
        assert text in out


@pytest.mark.parametrize("help", ["--help", "-h"])
def test_words_after_the_script_are_the_scripts(capsys, help):
    out, _ = dry_run(capsys, "--num_processes", "1", "s.py", help, "--num_proceses", "--cpu", "--", "-m")
    assert out == f"python s.py {help} --num_proceses --cpu -- -m\n"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["-m", "package.module", "--lr", "1"], "python -m package.module --lr 1"),
        (["--module", "module"], "python -m module"),
        (["--no_python", "bash", "-c", "ls"], "bash -c ls"),
        (["--", "s.py"], "python s.py"),
        (["-t", "3", "s.py"], "python -m torch.distributed.run --standalone --nproc-per-node 1 --tee 3 s.py"),
    ],
)
def test_forms_of_a_script(capsys, words, command):
    assert dry_run(capsys, "--num_processes", "1", *words)[0] == command + "\n"


def test_the_default_file_is_used_and_told(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(ANSWERS))
    assert main(["config", "--accelerate"]) == 0
    default = folder / "hf" / "accelerate" / "default_config.yaml"
    assert default.read_text() == GUIDE
    assert capsys.readouterr().out.endswith(f"wrote {default}; next:\n  megalith launch SCRIPT.py ARGS\n")
    out, err = dry_run(capsys, "s.py")
    assert "--nproc-per-node 4" in out
    assert err == f"megalith: configuration of {default}; --config_file names another\n"
    assert dry_run(capsys, "--config_file", "guide.yaml", "s.py") == (out, "")


def test_a_number_that_nobody_gave_is_told(capsys):
    out, err = dry_run(capsys, "--use_megatron_lm", "--megatron_lm_tp_degree", "2", "s.py")
    assert "--nproc-per-node 2" in out and err == "megalith: --num-processes is not given: 2 start\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--quiet", "--quiet has no effect here"),
        ("--same_network", "--same-network has no effect here: machines meet"),
        ("--main_training_function f", "the script is run from its first line"),
        ("--fp16", "--fp16 is read as --mixed-precision fp16"),
        ("--use_megatron_lm --megatron_lm_recompute_activation true", "is read as --megatron-lm-recompute-activations"),
    ],
)
def test_flags_without_effect_or_renamed_are_told(capsys, words, line):
    assert line in dry_run(capsys, "--num_processes", "1", *words.split(), "s.py")[1]


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("", ["The script must be named"]),
        ("gone.py", ["The script must be a file that exists; found 'gone.py'"]),
        ("--num_proceses 2 s.py --lr 1", ["unknown flag --num_proceses: did you mean --num-processes?"]),
        ("--qqqq s.py --lr 1", ["unknown flag --qqqq: megalith launch --help lists them"]),
        ("--cpuu s.py", ["unknown flag --cpuu: did you mean --cpu?"]),
        ("--nproc-per-node 2 --num_processes 2 s.py", ["--num-processes configures scripts for Accelerate"]),
        ("--master_addr a s.py", ["it is --main_process_ip here; for a verb, --rdzv-endpoint HOST:PORT"]),
        ("--use_deepspeed s.py", ["--use_deepspeed cannot be used: Write MEGATRON_LM"]),
        ("--tpu s.py", ["start the script with accelerate launch itself"]),
        ("--num_processes two s.py", ["--num_processes must be a number; found 'two'"]),
        ("--max_restarts -1 s.py", ["--max-restarts must be at least 0; found -1"]),
        ("--config_file gone.yaml s.py", ["must name a readable YAML file"]),
        ("--mixed_precision", ["--mixed_precision must have a value; found nothing"]),
        (
            "--megatron_lm_tp_degree 2 --num_processes 1.5 gone.py",
            ["3 problems", "--num-processes must be a whole number", "add --use_megatron_lm", "'gone.py'"],
        ),
    ],
)
def test_errors(capsys, words, messages):
    assert main(["launch", *words.split()]) == 2
    err = capsys.readouterr().err
    assert all(message in err for message in messages), err
    assert ("problems" in err) == (len(messages) > 1)


def test_help_is_quick_and_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-m", "megalith", "launch", "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and time.monotonic() - began < 3  # 0.2 s on a quiet machine
    flags = ["--cpu", "--multi-gpu", "--use-megatron-lm", *map(flag, {*keys(), *launch_options()} - {*verb.NO_FLAG})]
    assert not {*flags} - {*re.findall(r"--[a-z0-9-]+", found.stdout)}


def test_torch_is_not_imported():
    code = (
        "import sys\nfrom megalith.cli.main import main\n"
        "main(['launch', '--dry-run', '--config_file', 'guide.yaml', 's.py'])\n"
        "print({'torch', 'numpy', 'accelerate'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("set()\n")


def test_commands_of_the_document(capsys, folder):
    """docs/accelerate.md: its file and its commands, as far as `--dry-run` goes."""
    text = (ROOT / "docs/accelerate.md").read_text()
    (folder / "megatron_gpt_config.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    (folder / "train.py").touch()
    commands = re.findall(r"^megalith (launch .*)$", text, re.MULTILINE)
    assert len(commands) == 7
    for words in map(shlex.split, commands):
        out, err = dry_run(capsys, *words[1:])
        assert ("train.py" in out or "package.train" in out) and err == ""
