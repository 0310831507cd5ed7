"""The model file of CONTRIBUTING.md, run from there: every layout, resumed in another, parity, to another format
and back.
"""

import pathlib
import re
import shutil
import sys

import pytest
import torch

from megalith.checkpoint.weights import read_megalith
from megalith.cli.main import main
from megalith.common.errors import ConfigError
from megalith.config.flags.loading import load_config
from megalith.runtime.build import meta_model
from megalith.testing import run_ranks
from megalith.testing.parity import TOLERANCE, compare, measure, merge
from megalith.training.pretrain import train
from megalith.workflows import conversion
from tests.parity.cases import SMALL
from tests.tiny import losses, records, tiny_config, write_corpus

TEXT = (pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
LLAMA = {
    "model_type": "my_twist:Twist", "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
    "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "attention_dropout": 0.0,
}  # fmt: skip
LAYOUTS = {
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2, "micro_batch_size": 1},
    "dp2 sharded": {"data_parallel_sharding": "full"},
}


@pytest.fixture(autouse=True)
def my_twist(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """The file of CONTRIBUTING.md on the Python path."""
    (code,) = re.findall(r"```python\n(# my_twist\.py\n.*?)```", TEXT, re.DOTALL)
    assert code.count("\n") < 120
    (tmp_path / "code").mkdir()
    (tmp_path / "code/my_twist.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield
    sys.modules.pop("my_twist", None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(str(tmp_path_factory.mktemp("corpus") / "tiny"))


def in_layout(config, layout: str | None) -> None:
    if layout is None:
        train(config)
    else:
        run_ranks(train_quietly, 2, config, timeout=240)


def train_quietly(config) -> None:
    """On each rank of a pool."""
    train(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(layout: str) -> None:
    config = SMALL.replace(**LLAMA, num_layers=4)
    (expected,) = run_ranks(measure, 1, config.replace(micro_batch_size=4), torch.float64)
    found = merge(run_ranks(measure, 2, config.replace(**LAYOUTS[layout]), torch.float64))
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())
    assert {"down.weight", "up.weight"} <= expected.weights.keys()
    loss, worst, *_ = compare(expected, found, torch.float64)
    assert max(loss.error, worst.error) <= TOLERANCE[torch.float64], (loss, worst)


@pytest.mark.slow
def test_it_trains_and_resumes_in_another_layout(corpus: str, tmp_path: pathlib.Path) -> None:
    config = tiny_config(corpus, str(tmp_path / "whole"), **LLAMA, num_layers=4, train_iters=9, eval_iters=0)
    train(config)
    expected = losses(str(tmp_path / "whole"))
    names = list(LAYOUTS)
    for first, then in zip(names, [*names[1:], names[0]], strict=True):
        folder = tmp_path / first.replace(" ", "_")
        in_layout(config.replace(run_dir=str(folder), exit_interval=4, **LAYOUTS[first]), first)
        assert len(losses(str(folder))) == 4
        in_layout(config.replace(run_dir=str(folder), **LAYOUTS[then]), then)
        assert [line["step"] for line in records(str(folder)) if "loss" in line] == list(range(1, 10))
        assert losses(str(folder)) == pytest.approx(expected, rel=1e-4)
        shutil.rmtree(folder)


def test_it_goes_to_another_format_and_back(corpus: str, tmp_path: pathlib.Path) -> None:
    config = tiny_config(corpus, str(tmp_path / "run"), **LLAMA, train_iters=2, lr_warmup_iters=1, eval_iters=0)
    train(config)
    ours = read_megalith(tmp_path / "run")
    conversion.convert(tmp_path / "run", tmp_path / "theirs", to="huggingface")
    folders = [str(tmp_path / "theirs"), str(tmp_path / "back")]
    assert main(["checkpoint", "import", *folders, "--model-type", "my_twist:Twist"]) == 0
    back = read_megalith(tmp_path / "back")
    assert back.config.model.model_type == "my_twist:Twist"
    names = [name for name in ours if name.startswith("model/")]
    assert "model/down.weight" in names and names == [name for name in back if name.startswith("model/")]
    assert all(torch.equal(ours[name], back[name]) for name in names)
    rates = {"train_iters": 1, "lr": 0.0, "lr_warmup_iters": 0}
    begun = config.replace(load=str(tmp_path / "theirs"), run_dir=str(tmp_path / "begun"), **rates)
    train(begun)  # which the run says of what the folder is
    assert all(torch.equal(ours[name], read_megalith(tmp_path / "begun")[name]) for name in names)


@pytest.mark.slow
def test_megalith_parity_takes_it(capsys: pytest.CaptureFixture) -> None:
    (command,) = re.findall(r"megalith parity (--model-type my_twist:Twist .*?)\ntorchrun", TEXT, re.DOTALL)
    assert main(["parity", *command.replace("\\\n", " ").split()]) == 0
    assert "equal: " in capsys.readouterr().out


def test_what_is_wrong_with_it_is_reported_at_the_start(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "code/my_twist.py"
    code = file.read_text()

    def told(old: str, new: str, more: str = "") -> str:
        assert old in code
        sys.modules.pop("my_twist", None)
        file.write_text(f"{code.replace(old, new)}\n{more}\n")
        with pytest.raises(ConfigError) as caught:
            meta_model(SMALL.replace(**LLAMA).model)
        return str(caught.value)

    said = told("(model.hidden_size, RANK)", "(model.hidden_size, 9)")
    assert "must have the shapes of its record, my_twist:shapes: {'up.weight': (32, 9)}; found {'up.weight'" in said
    assert "Add 'up.weight' to them" in told('"up.weight": parameter_kinds', '"upp.weight": parameter_kinds')
    assert "cannot be imported" in told('shapes="my_twist:shapes"', 'shapes="my_twist:forms"')
    bare = "class Twist(nn.Module):\n    architecture = Whole.architecture\n"
    bare += "\n    def __init__(self, config, seed):\n        super().__init__()\n"
    said = told("class Twist(GPT)", "class Whole(GPT)", bare)
    assert "protocol.py declares; found no config, seed, layers, run_layers, restore, initial, forward. Add" in said


def test_its_flags_are_judged_like_any(corpus: str) -> None:
    config, _ = load_config(
        ["my_twist:Twist", "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4",
         "--seq-length", "16",
         "--data-path", corpus, "--tokenizer-type", "NullTokenizer", "--vocab-size", "48", "--micro-batch-size", "1",
         "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-3"]
    )  # fmt: skip
    assert config.logging.name == "twist" and config.data.dataset == "gpt" and config.data.loss == "lm"
