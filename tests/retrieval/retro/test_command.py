"""docs/retro.md, the script of examples/retro and the flags of Megatron's tools run as typed, at toy size."""

import json
import pathlib
import re

import pytest

from megalith.cli import main as command
from megalith.cli.retro import RETRO_FLAGS
from megalith.data.indexed import IndexedDataset
from megalith.data.retro import ChunkDatabase, Neighbors
from tests.retrieval.retro.toy_retro import SPECIAL, contents, write_bert
from tests.toy import ROOT, make_corpus, run

SMALL = (
    ("bert-large-cased", "bert"), ("2048", "128"), ("--global-batch-size 256", "--global-batch-size 4"),
    ("200000", "24"), ("--eval-interval 2000 --eval-iters 100", "--eval-interval 3 --eval-iters 1"),
    ("IVF4096,Flat", "IVF4,Flat --retro-bert-max-chunk-length 48"),
)  # fmt: skip

MODEL = "--num-layers 6 --hidden-size 32 --num-attention-heads 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The first block of docs/retro.md was run here, with small numbers."""
    folder = tmp_path_factory.mktemp("retro")
    make_corpus(folder)
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    joined = " ".join(texts)
    documents = [{"text": joined[first : first + 1500]} for first in range(0, 75_000, 1500)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    write_bert(folder / "bert", (folder / "vocab.txt").read_text().split()[len(SPECIAL) :], 48)
    (block, *_) = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/retro.md").read_text(), re.MULTILINE | re.DOTALL)
    for large, small in SMALL:
        assert large in block
        block = block.replace(large, small)
    (folder / "output").write_text(run(["bash", "-ec", block], folder))
    return folder


def test_the_document_runs_as_typed(folder):
    output = (folder / "output").read_text()
    database = ChunkDatabase(folder / "retro/db")
    assert len(IndexedDataset(str(folder / "my-gpt2_text_document"))) == 50
    assert database.description["datasets"][0]["documents"] == [0, 48]  # 96.9 %
    assert f"retro/db: {len(database)} chunks of 64 tokens from 48 documents in 1 blocks" in output
    assert "IVF4,Flat: recall of the 20 nearest" in output and "retro/neighbors/valid: 1 parts, undamaged" in output
    assert "no neighbours for test: there are no such samples" in output  # 0.1 % of 50 documents
    for split, samples in (("train", 24), ("valid", 12)):
        found = Neighbors(folder / "retro/neighbors" / split, {})
        assert len(found) == samples and found.of(0).shape == (2, 20) and (found.of(0) < len(database)).all()


@pytest.mark.slow
def test_the_script(folder):
    """The same steps in variables, the last two in two processes; then each step again, which changes nothing."""
    variables = {
        "RETRO_WORKDIR": "script", "DATA_PATH": "my-gpt2_text_document", "VOCAB_FILE": "vocab.json",
        "MERGE_FILE": "merges.txt", "BERT_LOAD_PATH": "bert", "SEQ_LENGTH": "128", "GLOBAL_BATCH": "4",
        "TRAIN_SAMPLES": "24", "EVAL_INTERVAL": "3", "EVAL_ITERS": "1", "BERT_LENGTH": "48", "PRECISION": "",
        "INDEX_STRING": "IVF4,Flat", "INDEX_TRAIN": "100000", "WORKERS": "1", "MASTER_PORT": "29571",
    }  # fmt: skip
    script = str(ROOT / "examples/retro/preprocess_data.sh")
    run([script], folder, **variables, GPUS_PER_NODE="2")
    found = contents(folder / "script")
    assert found == contents(folder / "retro")
    output = run([script], folder, **variables, RETRO_TASKS="neighbors")
    assert "1 of 1 blocks are there" in output and contents(folder / "script") == found


def test_megatrons_flags_act_or_are_told(folder, monkeypatch, capfd):
    """What Megatron's script passes; the words beside --retro-gpt are those of its BERT."""
    monkeypatch.chdir(folder)
    line = (
        "retro build --retro-tasks db-build --num-layers 1 --hidden-size 16 --seq-length 48 --load bert "
        "--tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt --data-path other --split 98,2,0 "
        "--bert-embedder-type megatron --output-bert-embeddings --retro-gpt-vocab-file vocab.json "
        "--retro-gpt-merge-file merges.txt --retro-gpt-tokenizer-type GPT2BPETokenizer --retro-gpt-seq-length 128 "
        "--retro-gpt-chunk-length 64 --retro-gpt-data-path my-gpt2_text_document --retro-gpt-split 969,30,1 "
        "--retro-bert-vocab-file vocab.txt --retro-bert-tokenizer-type BertWordPieceLowerCase "
        "--retro-index-type faiss-par-add --retro-return-doc-ids --retro-index-add-load-fraction 1.0 "
        "--retro-index-no-delete-added-codes --retro-workdir megatron"
    )
    assert command.main(line.split()) == 0
    printed = capfd.readouterr().err
    for told in (
        "--seq-length 48 is not looked at: --retro-gpt-seq-length 128 is the GPT's",
        "--vocab-file vocab.txt is not looked at: --retro-gpt-vocab-file vocab.json is the GPT's",
        "--split 98,2,0 is not looked at: --retro-gpt-split 969,30,1 is the GPT's",
        "--data-path other is not looked at: --retro-gpt-data-path my-gpt2_text_document is the GPT's",
        "--bert-embedder-type is not needed: the checkpoint says what it is",
        "--retro-index-type is not needed", "--retro-return-doc-ids is not needed",
        "--retro-index-add-load-fraction 1.0 changes nothing here",
    ):  # fmt: skip
        assert told in printed, told
    assert contents(folder / "megatron/db") == contents(folder / "retro/db")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("db", "--retro-workdir must name the folder that is written"),
        ("db --retro-workdir r", "--data-path must name the data of the training"),
        ("index --retro-workdir r", "--load must name a BERT"),
        ("neighbors --retro-workdir r --load bert --data-path x", "--seq-length must be that of the training"),
        ("build --retro-workdir r --retro-tasks db-make", "--retro-tasks must be of build, db-build"),
        ("db --retro-workdir r --data-path x --workers 0", "--workers must be a whole number above 0"),
        ("index --retro-workdir r --load b --retro-index-train-load-fraction 0.5", "--retro-index-ntrain says"),
        ("neighbors --retro-workdir r --dataloader-type cyclic", "--dataloader-type must be single"),
        ("index --retro-workdir r --load b --retro-nproob 3", "did you mean --retro-nprobe"),
        ("db more --retro-workdir r --data-path x", "unexpected 'more'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(words, message, capfd):
    assert command.main(["retro", *words.split()]) == 2
    assert message in capfd.readouterr().err


def test_flags_of_megatrons_tool(capfd):
    """Every flag of tools/retro/main.py, as its versions of 2022 and 2023 have them."""
    known = {each.name for each in RETRO_FLAGS}
    megatrons = """tasks block-size doc-block-size gpt-seed gpt-data-path gpt-split gpt-eval-interval gpt-eval-iters
    gpt-tokenizer-type gpt-vocab-file gpt-merge-file gpt-tokenizer-model gpt-seq-length gpt-global-batch-size
    gpt-chunk-length bert-vocab-file bert-tokenizer-type bert-batch-size bert-max-chunk-length index-nfeats index-type
    index-str index-ntrain index-train-load-fraction index-add-load-fraction index-no-delete-training-embeddings
    index-no-delete-added-codes query-ef-search query-nprobe query-num-neighbors-query query-num-neighbors-save workdir
    nchunks-sampled nnbrs-query nnbrs-target nnbrs-pretraining ef-search nprobe return-doc-ids precompute-bert-lengths
    index-ty"""
    assert [name for name in megatrons.split() if f"--retro-{name}" not in known] == []


def test_verify_of_another_folder(tmp_path, capfd):
    assert command.main(["retro", "verify", str(tmp_path)]) == 1
    assert "must be a folder that megalith retro wrote" in capfd.readouterr().err


SMALL_MODEL = (
    *SMALL[1:5], ("--num-layers 12 --hidden-size 768 --num-attention-heads 12", MODEL), ("bert-large-cased", "bert"),
    ("IVF4096,Flat", "IVF4,Flat"), ("--max-new-tokens 200", "--max-new-tokens 70"),
)  # fmt: skip


@pytest.mark.slow
def test_training_measuring_and_writing_run_as_typed(folder):
    """The block of the section on the model, with small numbers, on the folder of the first block."""
    block = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/retro.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    for large, small in SMALL_MODEL:
        assert large in block
        block = block.replace(large, small)
    (folder / "other.jsonl").write_text(json.dumps({"text": (folder / "vocab.txt").read_text()[-900:]}) + "\n")
    output = run(["bash", "-ec", block], folder)
    losses = [
        [line["validation_loss"] for line in map(json.loads, path.open()) if "validation_loss" in line][-1]
        for path in (folder / "runs/retro/metrics.jsonl", folder / "runs/without/metrics.jsonl")
    ]
    assert losses[0] != losses[1] and "Once upon a time" in output and "reads no neighbours" not in output
    alone = run(["megalith", "generate", "--load", "runs/retro", "--prompt", "Once", "--max-new-tokens", "3"], folder)
    assert "a Retro without a database reads no neighbours" in alone
    assert "runs/retro, with neighbours" in output and "runs/retro, without neighbours" in output
    ((one, other),) = re.findall(r"^ *average loss +([0-9.]+) +([0-9.]+)", output, re.MULTILINE)
    assert one != other


@pytest.mark.slow
def test_the_script_of_training_trains_and_resumes(folder):
    variables = {
        "RETRO_WORKDIR": "retro", "DATA_PATH": "my-gpt2_text_document", "VOCAB_FILE": "vocab.json",
        "MERGE_FILE": "merges.txt", "SEQ_LENGTH": "128", "GLOBAL_BATCH": "4", "TRAIN_SAMPLES": "24",
        "EVAL_INTERVAL": "3", "EVAL_ITERS": "1", "TRAIN_PRECISION": "", "NUM_LAYERS": "6", "HIDDEN_SIZE": "32",
        "NUM_HEADS": "2", "MICRO_BATCH": "2", "CHECKPOINT_PATH": "script-run", "GPUS_PER_NODE": "2", "TENSOR": "2",
        "MASTER_PORT": "29573",
    }  # fmt: skip
    script = str(ROOT / "examples/retro/pretrain_model.sh")
    assert "stopped after step 4" in run([script, "--exit-interval", "4"], folder, **variables)
    assert "all 6 steps are done" in run([script], folder, **variables)
