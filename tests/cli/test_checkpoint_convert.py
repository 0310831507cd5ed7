"""`megalith checkpoint import` and `export`: flags of ours and of other people's converters."""

import dataclasses
import pathlib
import shlex

import pytest
import torch

from megalith.checkpoint.formats import read
from megalith.checkpoint.weights import write
from megalith.cli.main import main
from tests.originals.families import MODELS


@pytest.fixture
def theirs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    torch.manual_seed(0)
    MODELS["gpt2"]().save_pretrained(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "theirs"


def run(line: str) -> int:
    return main(["checkpoint", *shlex.split(line)])


def test_import_verify_export(theirs, capsys):
    assert run("import theirs ours --verify --print-structure --hidden-dropout 0.25") == 0
    out = capsys.readouterr().out
    assert "52 tensors -> ours" in out and "verified: the logits differ" in out
    assert "model/layers.0.attention.q.weight" in out and "[48, 48] float32" in out
    assert read("ours").config.model.hidden_dropout == 0.25
    # Bfloat16 is not that near
    assert run("export ours back --to huggingface --bin --max-shard-size 60KB --dtype bf16 --verify") == 1
    assert "relative difference of logits" in capsys.readouterr().err
    assert len(list(pathlib.Path("back").glob("pytorch_model-*.bin"))) > 1
    assert run("export ours again --to huggingface --verify") == 0


def test_flags_of_transformers_converter(theirs, capsys):
    """seeds/000: the two commands, as typed there."""
    assert (
        run(
            "export --load_path theirs --save_path megatron --target_tensor_model_parallel_size 2 "
            "--target_pipeline_model_parallel_size 3 "
            "--target_data_parallel_size 1 --target_params_dtype fp32 --make_vocab_size_divisible_by 128 "
            "--print-checkpoint-structure"
        )
        == 0
    )
    out = capsys.readouterr().out
    for line in (
        "--load-path is read as SOURCE",
        "--target-tensor-model-parallel-size is read as --tensor-model-parallel-size",
    ):
        assert line.replace("-", "_") in out.replace("-", "_")
    assert len(list(pathlib.Path("megatron").rglob("model_optim_rng.pt"))) == 6
    assert (
        run(
            "export --convert_checkpoint_from_megatron_to_transformers --load_path megatron --save_path back "
            "--max_shard_size 200MB "
            "--tokenizer_name gpt2 --print-checkpoint-structure"
        )
        == 0
    )
    assert "--tokenizer-name gpt2 is no folder, and nothing is downloaded by name" in capsys.readouterr().out
    one, other = read("theirs"), read("back")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_export_reports_what_it_writes(theirs, capsys):
    """Without --with-optimizer: neither its tensors are counted, nor its layout stored."""
    weights = read("theirs")
    moments = {name.replace("model/", "optimizer/exp_avg/"): lazy for name, lazy in weights.tensors.items()}
    write(dataclasses.replace(weights, tensors={**weights.tensors, **moments}), "ours")
    assert run("export ours m --to megatron --use_distributed_optimizer --target_data_parallel_size 2") == 0
    out = capsys.readouterr().out
    for name in ("--use-distributed-optimizer", "--data-parallel-size"):
        assert f"{name} has no effect without --with-optimizer\n" in out
    assert "\n52 tensors -> m\n" in out
    arguments = torch.load("m/release/mp_rank_00/model_optim_rng.pt", weights_only=False)["args"]
    assert (arguments.use_distributed_optimizer, arguments.data_parallel_size) == (False, 1)


ERRORS = [
    (
        "import theirs",
        "megalith checkpoint import takes two paths, where to read and where to write; found ['theirs']. "
        "Write megalith checkpoint import SOURCE",
    ),
    (
        "export theirs back",
        "--to must name the format to write; found nothing. Write --to huggingface, or --to megatron.",
    ),
    ("export theirs back --to huggingfase", "unknown checkpoint format 'huggingfase'; did you mean 'huggingface'?"),
    (
        "export theirs back --to huggingface --max-shard-size big",
        "--max-shard-size must be a size such as 200MB, 5GB or 2GiB; found 'big'",
    ),
    ("export theirs back --to huggingface --dtype int8", "--dtype must be one of"),
    ("import theirs ours --ckpt-step last", "--ckpt-step must be a whole number; found 'last'"),
    ("import theirs ours --tokenizer nowhere", "--tokenizer must be a folder with tokenizer.json"),
    ("import theirs ours --hidden-dropout much", "--hidden-dropout must be a finite number"),
    ("import theirs ours --veryfy", "unknown flag --veryfy: did you mean --verify?"),
    ("import nowhere ours", "The source must be an existing file or folder; found 'nowhere'. Correct the path."),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors(line, message, theirs, capsys):
    assert run(line) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["import", "export"])
def test_help(verb, capsys):
    with pytest.raises(SystemExit):
        run(f"{verb} --help")
    assert f"megalith checkpoint {verb}" in capsys.readouterr().out
