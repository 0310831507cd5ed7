"""Copies that ranks keep of one parameter: compared, named with their difference, averaged if that is asked for."""

import pathlib
from collections.abc import Callable

import pytest
import torch

from megalith.checkpoint import formats
from megalith.checkpoint.formats.megatron.replicas import BLOCK_SIZE, Replicas, difference, mean
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.cli.main import main
from megalith.common.errors import CheckpointError, ConfigError
from megalith.generation.load import load
from tests.checkpoint import megatron_files
from tests.checkpoint.formats.deepspeed.test_megatron_deepspeed import write_pipelined, write_tree, write_zero_shards
from tests.checkpoint.formats.megatron.test_megatron_agreement import edit_files
from tests.checkpoint.megatron_files import Tensors, model_of

AVERAGE = {"replicas": "average"}


def nudge(*path: str, by: float = 0.5) -> Callable[[dict], None]:
    """What adds to one element of a tensor of a file."""

    def edit(content: dict) -> None:
        for word in path:
            content = content[word]
        content.view(-1)[3] += by  # type: ignore[attr-defined]

    return edit


STACK = ("model", "language_model", "encoder")
# {case: (rank, keys in its file, name in messages, canonical name)}
REPLICAS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "norm": ("01_000", (*STACK, "layers.0.input_layernorm.weight"), "encoder.layers.0.input_layernorm.weight",
             "layers.0.attention_norm.weight"),
    "bias of attention": ("01_001", (*STACK, "layers.1.self_attention.dense.bias"),
                          "encoder.layers.3.self_attention.dense.bias", "layers.3.attention.out.bias"),
    "bias of the MLP": ("01_000", (*STACK, "layers.1.mlp.dense_4h_to_h.bias"),
                        "encoder.layers.1.mlp.dense_4h_to_h.bias", "layers.1.mlp.down.bias"),
    "positions": ("01_000", ("model", "language_model", "embedding", "position_embeddings", "weight"),
                  "embedding.position_embeddings.weight", "position_embedding.weight"),
    "last norm": ("00_001", (*STACK, "final_layernorm.bias"), "encoder.final_layernorm.bias", "final_norm.bias"),
    "tied embedding": ("00_001", ("model", "word_embeddings_for_head", "weight"),
                       "embedding.word_embeddings.weight of tensor-parallel rank 0: "
                       "embedding.word_embeddings.weight and word_embeddings_for_head.weight", "embedding.weight"),
}  # fmt: skip


@pytest.mark.parametrize("place", REPLICAS)
def test_copies_that_differ_are_an_error_and_may_be_averaged(tmp_path: pathlib.Path, place: str) -> None:
    rank, path, megatron_name, canonical_name = REPLICAS[place]
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, pipeline=2, args={})
    edit_files(folder, nudge(*path), rank)
    found = r".* differ by up to 0\.5, the largest value is \d.*--replicas average takes the mean"
    with pytest.raises(CheckpointError, match=f"(?s){megatron_name}{found}"):
        formats.read(folder)
    weights = formats.read(folder, options=AVERAGE)
    assert any("copies of 1 parameters differ, their mean is taken: " + megatron_name in note for note in weights.notes)
    wanted = tensors[canonical_name].clone()
    wanted.view(-1)[3] += 0.25
    for name, tensor in tensors.items():
        assert torch.allclose(
            weights[f"model/{name}"], wanted if name == canonical_name else tensor, rtol=0, atol=1e-6
        ), name


def test_all_are_told_at_once_and_on_the_command_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = model_of(position_embedding_type="alibi")
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=4, args=dict(position_embedding_type="alibi"))
    for rank in ("01", "03"):
        edit_files(folder, nudge(*STACK, "layers.2.post_attention_layernorm.bias"), rank)
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "new")]) != 0
    error = capsys.readouterr().err
    assert (
        "tensor-parallel rank 0 and tensor-parallel rank 1 differ" in error
        and "rank 0 and tensor-parallel rank 3 differ" in error
    )
    assert not (tmp_path / "new").exists()
    assert main(["checkpoint", "reshape", str(folder), str(tmp_path / "new"), "--replicas", "average"]) == 0
    assert "their mean is taken" in capsys.readouterr().out
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "other"), "--replicas", "first"]) != 0
    with pytest.raises(CheckpointError, match="--replicas average takes the mean"):
        load(folder)
    assert any("their mean is taken" in note for note in load(folder, replicas="average").notes)
    with pytest.raises(ConfigError, match="--replicas must be one of equal, average; found 'first'"):
        load(folder, replicas="first")


def test_rounding_is_no_difference_but_is_told(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, args={})
    edit_files(folder, nudge(*STACK, "layers.0.input_layernorm.weight", by=1e-6), "01")
    weights = formats.read(folder)
    assert any(
        "copies of 1 parameters differ by rounding, the first is taken: encoder.layers.0" in note
        for note in weights.notes
    )
    assert torch.equal(weights["model/layers.0.attention_norm.weight"], tensors["layers.0.attention_norm.weight"])


@pytest.mark.parametrize("dtype, by, allowed", [
    (torch.float32, 1e-6, True), (torch.float32, 1e-3, False), (torch.bfloat16, 2**-7, True),
    (torch.bfloat16, 2**-5, False), (torch.float16, 2**-10, True), (torch.float16, 2**-8, False),
    (torch.float32, float("nan"), False),
])  # fmt: skip
def test_what_rounding_is(dtype: torch.dtype, by: float, allowed: bool) -> None:
    one = torch.linspace(-1, 1, 3 * BLOCK_SIZE // 64 * 128).view(-1, 128).to(dtype)
    other = one.clone()
    other[-1, -1] = 1 + by
    found = difference(_lazy(one), _lazy(other))
    assert found.rounding is allowed and (found.largest == pytest.approx(by, abs=2**-11, nan_ok=True))
    assert difference(_lazy(one), _lazy(other), rows=len(one) - 1).largest == 0  # rows that are padding do not count
    assert_same_weights = torch.full((3,), float("nan"))
    assert difference(_lazy(assert_same_weights), _lazy(assert_same_weights.clone())).largest == 0


def test_padding_of_the_tied_copy_may_differ(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, pipeline=2, args={})
    edit_files(folder, lambda content: content["model"]["word_embeddings_for_head"]["weight"][32:].zero_(), "01_001")
    assert torch.equal(formats.read(folder)["model/embedding.weight"], tensors["embedding.weight"])


def test_an_output_layer_that_arguments_call_tied(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of(untie_embeddings_and_output_weights=True)
    said = dict(untie_embeddings_and_output_weights=False)
    folder = megatron_files.write(tmp_path / "m", config, tensors, args=said)
    message = (
        "(?s)embedding.word_embeddings.weight and output_layer.weight differ by up to"
        ".*; --untie-embeddings-and-output-weights reads"
    )
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder)
    kept = formats.read(folder, options=dict(overrides=dict(untie_embeddings_and_output_weights=True)))
    assert torch.equal(kept["model/head.weight"], tensors["head.weight"])
    untied = megatron_files.write(tmp_path / "u", config, tensors, args=dict(untie_embeddings_and_output_weights=True))
    with pytest.raises(CheckpointError, match=message):  # a flag that would drop the head
        formats.read(untied, options=dict(overrides=dict(untie_embeddings_and_output_weights=False)))


def test_copies_in_virtual_stages(tmp_path: pathlib.Path) -> None:
    """Of one rank's chunks the last came to count, unseen."""
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, virtual=2, args={})

    def again(content: dict) -> None:
        embedding = content["model0"]["language_model"]["embedding"]
        content["model1"]["language_model"]["embedding"] = {
            "word_embeddings": {"weight": embedding["word_embeddings"]["weight"] + 1}
        }

    edit_files(folder, again)
    where = r"embedding.word_embeddings.weight: \S+, model0 and \S+, model1 differ by up to 1,"
    with pytest.raises(CheckpointError, match=where):
        formats.read(folder)


def nudge_file(file: pathlib.Path, name: str) -> None:
    """Change a tensor of a layer's file."""
    content = torch.load(file)
    content[name].view(-1)[3] += 0.5
    torch.save(content, file)


RANKS = "tensor-parallel rank 0 and tensor-parallel rank 1"


@pytest.mark.parametrize("number, rank, name, message", [
    ("03", 1, "input_layernorm.bias", rf"encoder.layers.1.input_layernorm.bias: {RANKS}"),
    ("05", 1, "mlp.dense_4h_to_h.bias", rf"encoder.layers.3.mlp.dense_4h_to_h.bias: {RANKS}"),
    ("08", 0, "word_embeddings.weight",
     r"embedding.word_embeddings.weight: layer_01-model_00\S+ and layer_08-model_00\S+"),
    ("01", 1, "position_embeddings.weight", rf"embedding.position_embeddings.weight: {RANKS}"),
])  # fmt: skip
def test_copies_in_layer_files_of_deepspeed(
    tmp_path: pathlib.Path, number: str, rank: int, name: str, message: str
) -> None:
    write_pipelined(tmp_path, {}, {}, 2, 1)
    nudge_file(tmp_path / f"global_step7/layer_{number}-model_0{rank}-model_states.pt", name)
    with pytest.raises(CheckpointError, match=message + " differ by up to 0.5"):
        formats.read(tmp_path)
    assert any("their mean is taken" in note for note in formats.read(tmp_path, options=AVERAGE).notes)


def test_copies_of_the_optimizers_state(tmp_path: pathlib.Path) -> None:
    _, flat = write_tree(tmp_path, {}, {}, 2)
    flat[1] = {
        name: each + 1 if name.endswith("layers.1.input_layernorm.bias") else each for name, each in flat[1].items()
    }
    write_zero_shards(tmp_path / "ds/global_step7", flat, 2, False, "")
    formats.read(tmp_path / "ds")
    message = rf"optimizer/exp_avg/encoder.layers.1.input_layernorm.bias: {RANKS} differ by up to 1"
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path / "ds", options=dict(with_optimizer=True))


def test_a_mean_in_parts_and_in_blocks() -> None:
    copies: list[Tensors] = [{"x": torch.randn(3000, 200).bfloat16()} for _ in range(3)]
    made = mean([_lazy(each["x"]) for each in copies])
    wanted = (sum(each["x"].float() for each in copies) * (1 / 3)).bfloat16()
    assert torch.equal(made.read(), wanted) and torch.equal(
        made.part((slice(7, 2900), slice(3, 9))), wanted[7:2900, 3:9]
    )
    replicas = Replicas("average")
    replicas.merge("x", {"a": _lazy(torch.zeros(3)), "b": _lazy(torch.zeros(4))})
    with pytest.raises(CheckpointError, match=r"x: a has \[3\], b \[4\]"):
        replicas.check()


def _lazy(tensor: torch.Tensor) -> Lazy:
    return Lazy(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor, box=lambda index: tensor[index])
