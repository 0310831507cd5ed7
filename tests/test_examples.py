"""The scripts of examples/ run as they are, at toy size, on real pieces: preprocess, train, and go on from the checkpoint."""

import json
import pathlib

import pytest

from tests.toy import ROOT, make_corpus, run

TOY = {
    "NUM_LAYERS": "2",
    "HIDDEN_SIZE": "32",
    "NUM_HEADS": "2",
    "SEQ_LENGTH": "32",
    "MICRO_BATCH": "2",
    "DECAY_ITERS": "6",
    "PRECISION": "",
}
FLAGS = ["--train-iters", "6", "--eval-iters", "1", "--log-interval", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder in which the README's preprocess command was run."""
    folder = tmp_path_factory.mktemp("examples")
    make_corpus(folder)
    command = "megalith data preprocess --input corpus.jsonl --output-prefix my-gpt2 --tokenizer-type GPT2BPETokenizer"
    run([*command.split(), "--vocab-file", "vocab.json", "--merge-file", "merges.txt", "--append-eod", "--workers", "1"], folder)
    return folder


def steps(folder: pathlib.Path, name: str) -> list[int]:
    """Steps in the metrics of the run folder."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("script", "variables"),
    [("pretrain_gpt.sh", {"GLOBAL_BATCH": "4"}), ("pretrain_gpt_distributed.sh", {"GPUS_PER_NODE": "2", "MASTER_PORT": "29531"})],
)
def test_script_trains_and_goes_on(script: str, variables: dict[str, str], folder: pathlib.Path) -> None:
    name = pathlib.Path(script).stem
    paths = {
        "CHECKPOINT_PATH": f"{name}/checkpoints",
        "VOCAB_FILE": "vocab.json",
        "MERGE_FILE": "merges.txt",
        "DATA_PATH": "my-gpt2_text_document",
    }
    command = [str(ROOT / "examples" / script), *FLAGS, "--run-dir", name]
    run([*command, "--exit-interval", "4"], folder, **TOY, **paths, **variables)
    assert (folder / paths["CHECKPOINT_PATH"] / "latest").read_text().strip() == "iter_0000004"
    output = run(command, folder, **TOY, **paths, **variables)
    assert "resuming after step 4" in output
    assert steps(folder, name) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("script", ["pretrain_gpt.sh", "pretrain_gpt_distributed.sh"])
def test_the_defaults_are_the_345m_model(script: str, folder: pathlib.Path) -> None:
    paths = {"CHECKPOINT_PATH": "unused", "VOCAB_FILE": "vocab.json", "MERGE_FILE": "merges.txt", "DATA_PATH": "my-gpt2_text_document"}
    output = run(
        [str(ROOT / "examples" / script), "--dry-run", "--vocab-size", "50257"], folder, **paths, GPUS_PER_NODE="1", MASTER_PORT="29532"
    )
    assert "354,823,168 parameters" in output
    assert not (folder / "unused").exists()
