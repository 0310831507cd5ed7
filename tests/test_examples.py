"""The scripts of examples/ run as they are, at toy size: preprocess, train, resume from the checkpoint."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from megalith.config.flags.loading import from_yaml
from tests.toy import ROOT, make_corpus, run

TOY = {
    "NUM_LAYERS": "2",
    "HIDDEN_SIZE": "32",
    "NUM_HEADS": "2",
    "HEAD_SIZE": "16",
    "SEQ_LENGTH": "32",
    "MICRO_BATCH": "2",
    "DECAY_ITERS": "6",
    "PRECISION": "",
}
FLAGS = ["--train-iters", "6", "--eval-iters", "1", "--log-interval", "1"]
BERT = {"VOCAB_FILE": "vocab.txt", "DATA_PATH": "my-bert_text_sentence"}
T5 = BERT  # the same vocabulary and sentences
ICT = BERT | {"TITLES_DATA_PATH": "my-bert_source_sentence"}
GPT = {"VOCAB_FILE": "vocab.json", "MERGE_FILE": "merges.txt", "DATA_PATH": "my-gpt2_text_document"}
RUNS = {  # name: script and the variables that make it small: one process, data parallelism, and a split model
    "gpt": ("pretrain_gpt.sh", GPT | {"GLOBAL_BATCH": "4"}),
    "gpt-data": ("pretrain_gpt.sh", GPT | {"GPUS_PER_NODE": "2", "GLOBAL_BATCH": "4", "MASTER_PORT": "29531"}),
    "gpt-tensor": (
        "pretrain_gpt.sh",
        GPT | {"GPUS_PER_NODE": "2", "TENSOR": "2", "GLOBAL_BATCH": "4", "MASTER_PORT": "29532"},
    ),
    "bert": ("pretrain_bert.sh", BERT | {"GLOBAL_BATCH": "4"}),
    "bert-data": ("pretrain_bert.sh", BERT | {"GPUS_PER_NODE": "2", "GLOBAL_BATCH": "4", "MASTER_PORT": "29533"}),
    "bert-pipeline": (
        "pretrain_bert.sh",
        BERT | {"GPUS_PER_NODE": "2", "PIPELINE": "2", "GLOBAL_BATCH": "8", "MASTER_PORT": "29534"},
    ),
    "t5": ("pretrain_t5.sh", T5 | {"GLOBAL_BATCH": "4"}),
    "t5-data": ("pretrain_t5.sh", T5 | {"GPUS_PER_NODE": "2", "GLOBAL_BATCH": "4", "MASTER_PORT": "29535"}),
    "t5-pipeline": (
        "pretrain_t5.sh",
        T5 | {"GPUS_PER_NODE": "2", "PIPELINE": "2", "GLOBAL_BATCH": "8", "MASTER_PORT": "29536"},
    ),
    "ict": ("pretrain_ict.sh", ICT | {"GLOBAL_BATCH": "4"}),
    "ict-data": ("pretrain_ict.sh", ICT | {"GPUS_PER_NODE": "2", "GLOBAL_BATCH": "4", "MASTER_PORT": "29537"}),
}
SLOW = [name for name in RUNS if name != "gpt"]
SIZES = {  # of the defaults: words of the vocabulary that --vocab-size counts, parameters
    "gpt": ("50257", "354,823,168 parameters"),
    "bert": ("30524", "336,228,158 parameters"),
    "t5": ("30624", "222,421,920 parameters"),
    "ict": ("30524", "217,590,016 parameters"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder in which the README's preprocess command was run."""
    folder = tmp_path_factory.mktemp("examples")
    make_corpus(folder)
    preprocess = "megalith data preprocess --input corpus.jsonl --workers 1 --output-prefix"
    gpt2 = "my-gpt2 --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod"
    bert = "my-bert --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt --split-sentences"
    bert += " --json-keys text source"  # what a text is from serves as its title
    for options in (gpt2, bert):
        run(f"{preprocess} {options}".split(), folder)
    return folder


def steps(folder: pathlib.Path, name: str) -> list[int]:
    """Steps in the metrics of the run folder."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_script_trains_and_resumes(name: str, folder: pathlib.Path) -> None:
    script, settings = RUNS[name]
    variables = TOY | settings | {"DECODER_SEQ_LENGTH": "16", "CHECKPOINT_PATH": f"{name}/checkpoints"}
    command = [str(ROOT / "examples" / script), *FLAGS, "--run-dir", name]
    run([*command, "--exit-interval", "4"], folder, **variables)
    assert (folder / variables["CHECKPOINT_PATH"] / "latest").read_text().strip() == "iter_0000004"
    output = run(command, folder, **variables)
    assert "resuming after step 4" in output
    assert steps(folder, name) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_continued_training_of_a_llama(tmp_path: pathlib.Path) -> None:
    """All steps of examples/continue_llama.sh, stopped half-way and given again."""
    from tests.test_continue_llama import make_llama

    make_llama(tmp_path)
    variables = {
        "LLAMA": "llama",
        "TEXT": "text",
        "WORK": "work",
        "SEQ_LENGTH": "16",
        "GLOBAL_BATCH": "4",
        "PRECISION": "",
    }
    variables |= {"TRAIN_ITERS": "6", "EPOCHS": "web: 1, books: 3", "MICRO_BATCH": "2"}
    script = str(ROOT / "examples" / "continue_llama.sh")
    run([script, "--exit-interval", "4"], tmp_path, **variables, STEPS="tokens merge weights import train")
    output = run([script], tmp_path, **variables)
    assert "resuming after step 4" in output and (tmp_path / "work/llama-continued/config.json").exists()
    assert steps(tmp_path / "work", "run") == [1, 2, 3, 4, 5, 6]
    run(["megalith", "config", "--from-script", script, "--output", "llama.yaml"], tmp_path, **variables)
    config = from_yaml((tmp_path / "llama.yaml").read_text())
    trained = from_yaml((tmp_path / "work/run/config.yaml").read_text())
    assert (config.model, config.batch, config.schedule) == (trained.model, trained.batch, trained.schedule)


def test_the_scripts_of_examples_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck")
    scripts = sorted(map(str, (ROOT / "examples").rglob("*.sh")))
    found = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("model", SIZES)
def test_the_defaults_are_megatrons_models(model: str, folder: pathlib.Path) -> None:
    vocabulary, parameters = SIZES[model]
    script, settings = RUNS[model]
    command = [str(ROOT / "examples" / script), "--dry-run", "--vocab-size", vocabulary]
    output = run(command, folder, **settings | {"GLOBAL_BATCH": "128", "CHECKPOINT_PATH": "unused"})
    assert parameters in output
    assert not (folder / "unused").exists()
