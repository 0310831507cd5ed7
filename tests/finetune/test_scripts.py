"""The scripts of examples/ and the commands of docs/finetune_tasks.md run as they are, at toy size."""

import pathlib
import re
import shutil
import sys

import pytest
import yaml

from megalith.training.pretrain import train
from tests.finetune.files import write_all
from tests.tiny import records, tiny_bert, write_sentences
from tests.toy import ROOT, run

TOY = {
    "NUM_LAYERS": "2", "HIDDEN_SIZE": "32", "NUM_HEADS": "4", "SEQ_LENGTH": "24", "PRECISION": "",
    "VOCAB_FILE": "vocab.txt", "PRETRAINED_CHECKPOINT": "bert_345m", "PYTHON": sys.executable,
}  # fmt: skip
MNLI = {"TRAIN_DATA": "MNLI/train.tsv", "VALID_DATA": "MNLI/dev_matched.tsv MNLI/dev_mismatched.tsv"}
RACE = {"TRAIN_DATA": "RACE/train/middle", "VALID_DATA": "RACE/dev/middle RACE/dev/high"}
RUNS = {  # name -> script, variables, steps of two epochs
    "mnli": ("finetune_mnli_distributed.sh", MNLI, 6),
    "race": ("finetune_race_distributed.sh", RACE, 5),
    "mnli-data": (
        "finetune_mnli_distributed.sh", MNLI | {"GPUS_PER_NODE": "2", "MICRO_BATCH": "4", "MASTER_PORT": "29541"}, 6
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """What the documents have: MNLI, RACE, a pretrained BERT."""
    folder = tmp_path_factory.mktemp("scripts")
    write_all(folder)
    (folder / "MNLI").mkdir()
    for path in folder.glob("*.tsv"):
        shutil.move(path, folder / "MNLI")
    prefix, run_dir = write_sentences(str(folder / "tiny")), str(folder / "bert_345m")
    few = {"train_iters": 1, "lr_warmup_iters": 0, "eval_iters": 0}
    train(tiny_bert(prefix, run_dir, vocab_file=str(folder / "vocab.txt"), **few))
    return folder


@pytest.mark.parametrize(
    "name", [name if name == "mnli" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_script(name: str, folder: pathlib.Path) -> None:
    script, variables, steps = RUNS[name]
    command = [str(ROOT / "examples" / script), "--epochs", "2", "--device", "cpu"]
    said = run(command, folder, **TOY, **variables, CHECKPOINT_PATH=f"runs/{name}")
    assert "the head (classifier) is new and untrained" in said
    assert [line["step"] for line in records(str(folder / "runs" / name)) if "loss" in line] == list(
        range(1, steps + 1)
    )


@pytest.mark.slow
def test_the_page_runs(folder: pathlib.Path) -> None:
    page = (ROOT / "docs/finetune_tasks.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    texts = [f'{{"headline": "w{number} w2", "body": "w3", "topic": "{topic}"}}'
             for number, topic in enumerate(("sport", "politics", "science", "sport"))]  # fmt: skip
    (folder / "topics.jsonl").write_text("\n".join(texts))
    (folder / "topics_dev.csv").write_text('headline,body,topic\n"w1, w2",w3,science\nw2,w4,sport\n')
    for language, body in blocks:
        if language == "yaml":
            (folder / body.split()[1]).write_text(body)
            assert yaml.safe_load(body)["labels"]
        else:
            run(["bash", "-euo", "pipefail", "-c", body], folder)
    for name in ("mnli", "race", "measured", "topics"):
        assert list((folder / name).glob("predictions_*.tsv")) and (folder / name / "results.json").exists()
