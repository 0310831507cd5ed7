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
BERT = {"VOCAB_FILE": "vocab.txt", "DATA_PATH": "my-bert_text_sentence"}
T5 = BERT  # the same vocabulary and sentences
GPT = {"VOCAB_FILE": "vocab.json", "MERGE_FILE": "merges.txt", "DATA_PATH": "my-gpt2_text_document"}
SCRIPTS = {  # with the variables that make them small
    "pretrain_gpt.sh": GPT | {"GLOBAL_BATCH": "4"},
    "pretrain_gpt_distributed.sh": GPT | {"GPUS_PER_NODE": "2", "MASTER_PORT": "29531"},
    "pretrain_gpt_distributed_with_mp.sh": GPT
    | {"GPUS_PER_NODE": "2", "PIPELINE": "1", "GLOBAL_BATCH": "4", "MASTER_PORT": "29532"},
    "pretrain_bert.sh": BERT | {"GLOBAL_BATCH": "4"},
    "pretrain_bert_distributed.sh": BERT | {"GPUS_PER_NODE": "2", "MASTER_PORT": "29533"},
    "pretrain_bert_distributed_with_mp.sh": BERT
    | {"GPUS_PER_NODE": "2", "TENSOR": "1", "GLOBAL_BATCH": "8", "MASTER_PORT": "29534"},
    "pretrain_t5.sh": T5 | {"GLOBAL_BATCH": "4"},
    "pretrain_t5_distributed.sh": T5 | {"GPUS_PER_NODE": "2", "MASTER_PORT": "29535"},
    "pretrain_t5_distributed_with_mp.sh": T5
    | {"GPUS_PER_NODE": "2", "TENSOR": "1", "GLOBAL_BATCH": "8", "MASTER_PORT": "29536"},
}
SLOW = [name for name in SCRIPTS if "gpt" not in name]
SIZES = {  # of the defaults: words of the vocabulary that --vocab-size counts, parameters
    "gpt": ("50257", "354,823,168 parameters"),
    "bert": ("30524", "336,228,158 parameters"),
    "t5": ("30624", "222,421,920 parameters"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder in which the README's preprocess command was run."""
    folder = tmp_path_factory.mktemp("examples")
    make_corpus(folder)
    preprocess = "megalith data preprocess --input corpus.jsonl --workers 1 --output-prefix"
    gpt2 = "my-gpt2 --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod"
    bert = "my-bert --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt --split-sentences"
    for options in (gpt2, bert):
        run(f"{preprocess} {options}".split(), folder)
    return folder


def steps(folder: pathlib.Path, name: str) -> list[int]:
    """Steps in the metrics of the run folder."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.parametrize("script", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SCRIPTS])
def test_script_trains_and_goes_on(script: str, folder: pathlib.Path) -> None:
    name = pathlib.Path(script).stem
    variables = TOY | SCRIPTS[script] | {"DECODER_SEQ_LENGTH": "16", "CHECKPOINT_PATH": f"{name}/checkpoints"}
    command = [str(ROOT / "examples" / script), *FLAGS, "--run-dir", name]
    run([*command, "--exit-interval", "4"], folder, **variables)
    assert (folder / variables["CHECKPOINT_PATH"] / "latest").read_text().strip() == "iter_0000004"
    output = run(command, folder, **variables)
    assert "resuming after step 4" in output
    assert steps(folder, name) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_are_megatrons_models(script: str, folder: pathlib.Path) -> None:
    vocabulary, parameters = SIZES[script.split("_")[1].removesuffix(".sh")]
    command = [str(ROOT / "examples" / script), "--dry-run", "--vocab-size", vocabulary]
    alone = {"GPUS_PER_NODE": "1", "TENSOR": "1", "PIPELINE": "1", "GLOBAL_BATCH": "16", "CHECKPOINT_PATH": "unused"}
    output = run(command, folder, **SCRIPTS[script] | alone)
    assert parameters in output
    assert not (folder / "unused").exists()
