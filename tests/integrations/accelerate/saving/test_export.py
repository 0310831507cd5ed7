"""save_pretrained and state_dict: what transformers makes of a model that was trained in a layout."""

import json
import pathlib
import re
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor

from megalith.common.errors import CheckpointError, ConfigError
from megalith.integrations.accelerate.saving import export
from megalith.runtime.load import weights_of
from megalith.testing.parity import batch, forward_backward_once
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import HEADS, KINDS, accelerating, toy_model
from tests.integrations.accelerate.prepared import prepare, processes, train, whole_weights
from tests.originals.families import BERTS, MODELS

IDS = torch.arange(4, 52).view(4, 12)
HEADED = [(kind, head) for kind in ("bert", "megatron-bert") for head in ("masked", "pretraining", "classification")]
CASES = [(kind, head) for kind, (_, head) in KINDS.items() if "bert" not in kind] + HEADED


def exported(
    kind: str, head: str, layout: str, folder: str, options: dict[str, Any]
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Train and export; the loss of the next batch, this rank's weights and its state_dict."""
    with accelerating():
        session = prepare(toy_model(kind, head), layout)
        train(session, 2)
        export.save_pretrained(session, folder, **options)
        found = export.state_dict(session)
        return forward_backward_once(session.runtime, 2), whole_weights(session), found


def check(kind: str, head: str, layout: str, folder: pathlib.Path, **options: Any) -> transformers.PreTrainedModel:
    """The exported model, which has the weights of the ranks, and its config those of what transformers saves."""
    results = run_ranks(exported, processes(layout), kind, head, layout, str(folder / "export"), options)
    original = toy_model(kind, head)
    reloaded = type(original).from_pretrained(folder / "export", dtype=torch.float32)
    found, seen = weights_of(reloaded), set()
    for _, weights, _ in results:
        for name, tensor in weights.items():
            assert torch.equal(found[f"model/{name}"], tensor), name
            seen.add(f"model/{name}")
    assert seen == set(found)
    assert [bool(state) for *_, state in results] == [False] * (len(results) - 1) + [True]
    expected, state = reloaded.state_dict(), results[-1][2]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    original.save_pretrained(folder / "original")
    for name in ("config.json", "generation_config.json"):
        if (folder / "original" / name).exists():
            contents = [json.loads((folder / each / name).read_text()) for each in ("export", "original")]
            assert contents[0] == contents[1], name
    if head == "causal":
        assert loss_of(reloaded, kind) == pytest.approx(results[0][0], rel=1e-5)
    assert not [path for path in (folder / "export").iterdir() if path.name.startswith(".")]
    return reloaded


def loss_of(model: transformers.PreTrainedModel, kind: str) -> float:
    """transformers' loss of the batch after two steps."""
    config = weights_of(model).config.replace(seq_length=16, global_batch_size=8)
    data = batch(config, 2)
    ids = torch.cat([data["input_ids"], data["labels"][:, -1:]], dim=1)
    labels = ids.clone()
    labels[:, 1:] = data["labels"].masked_fill(data["loss_mask"] == 0, -100)
    with torch.no_grad():
        return model.eval()(ids, labels=labels).loss.item()


FAST = {("gpt2", "causal", "one"), ("t5", "seq2seq", "one"), ("megatron-bert", "pretraining", "pp2")}


@pytest.mark.parametrize(
    ("kind", "head", "layout"),
    [
        pytest.param(*case, layout, marks=() if (*case, layout) in FAST else pytest.mark.slow)
        for case in CASES
        for layout in ("one", "dp2 sharded", "tp2", "pp2", "tp2 pp2")
    ],
)
def test_transformers_reloads_what_was_trained(kind: str, head: str, layout: str, tmp_path: pathlib.Path) -> None:
    check(kind, head, layout, tmp_path)


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2 pp2", marks=pytest.mark.slow)])
def test_shards_and_torch_files(layout: str, tmp_path: pathlib.Path) -> None:
    """Also what an earlier export left is gone, and what others put into the folder stays."""
    check("gpt2", "causal", layout, tmp_path, max_shard_size="40KB")
    folder = tmp_path / "export"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    (folder / "notes.txt").write_text("mine")
    check("gpt2", "causal", layout, tmp_path, safe_serialization=False)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "pytorch_model.bin", "notes.txt"}


@pytest.mark.parametrize(
    "name", [name if name == "neox" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS | BERTS]
)
def test_every_family_has_the_names_of_its_state_dict(name: str) -> None:
    with accelerating():
        model = (MODELS | BERTS)[name]().float()
        found, expected = export.state_dict(prepare(model, optimizer=None)), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_state_dict_may_be_given_and_tokenizer_files_go_along(tmp_path: pathlib.Path) -> None:
    """Of the common idiom `save_pretrained(..., state_dict=accelerator.get_state_dict(model))`; of all heads."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with accelerating():
        session = prepare(toy_model("bert", "masked"))
        session.tokenizer_folder = tmp_path / "tokenizer"
        state = {name: tensor * 2 for name, tensor in export.state_dict(session).items()}
        save: Any = None
        export.save_pretrained(session, tmp_path / "new", is_main_process=True, state_dict=state, save_function=save)
    reloaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        doubled = toy_model("bert", "masked")
        doubled.load_state_dict(state)
        torch.testing.assert_close(reloaded(IDS).logits, doubled.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"


def test_accelerate_dispatches_it(tmp_path: pathlib.Path) -> None:
    with accelerating():
        session = prepare(toy_model("gpt2"))
        train(session, 1)
        export.save_pretrained(session, tmp_path / "new")
        with init_empty_weights():
            empty = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(tmp_path / "new"))
        empty.tie_weights()
        model = load_checkpoint_and_dispatch(empty, tmp_path / "new", device_map={"": "cpu"})
        expected = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "new")
        assert torch.equal(model.eval()(IDS).logits, expected.eval()(IDS).logits)


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("No space left on device")

    with accelerating():
        session = prepare(toy_model("gpt2"))
        export.save_pretrained(session, tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        train(session, 1)
        monkeypatch.setattr(export.huggingface.files, "write_tensors", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            export.save_pretrained(session, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


WRONG: dict[str, dict[str, Any]] = {
    "save_pretrained does not have this option here; found push_to_hub": {"push_to_hub": True},
    "is_main_process must be True somewhere": {"is_main_process": False},
    "max_shard_size must be a number of bytes": {"max_shard_size": "5 apples"},
    "state_dict must have tensors on one process; found {} everywhere": {"state_dict": {}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told(message: str, tmp_path: pathlib.Path) -> None:
    with accelerating():
        session = prepare(toy_model("gpt2"))
        with pytest.raises(ConfigError, match=re.escape(message)):
            export.save_pretrained(session, tmp_path, **WRONG[message])
    assert not list(tmp_path.iterdir()) and set(HEADS) >= {head for _, head in CASES}
