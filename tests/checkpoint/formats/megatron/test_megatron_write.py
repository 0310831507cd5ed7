"""Weights and optimizer exported to Megatron come back bit for bit from every layout, and torch reads the files."""

import dataclasses
import pathlib

import pytest
import torch

from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, HuggingFaceOptions, MegatronOptions
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.torch_file import Placeholder, save
from megalith.checkpoint.tensors.unpickle import load_file
from megalith.checkpoint.weights import Weights, read_megalith
from megalith.checkpoint.weights import write as write_own
from megalith.common.errors import CheckpointError
from megalith.config.run import RunConfig
from tests.checkpoint.megatron_files import SMALL, model_of

LAYOUTS = {
    "one": {},
    "tp2 pp2": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp2 pp2 virtual": dict(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1
    ),
    "pp4": dict(pipeline_model_parallel_size=4),
}
SCHEDULE = {"lr": 1e-3, "decay_samples": 700, "lr_decay_style": "cosine", "warmup_samples": 10}


def lazy_of(tensor: torch.Tensor) -> Lazy:
    return Lazy(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def make_weights(optimizer: bool = False, **changes) -> Weights:
    """A model's weights as an importer gives them, with Adam's state if asked for."""
    _, tensors = model_of(**changes)
    found = {f"model/{name}": lazy_of(tensor) for name, tensor in tensors.items()}
    state: dict = {"iteration": 5, "consumed_train_samples": 40, "consumed_valid_samples": 8}
    if optimizer:
        for name, tensor in tensors.items():
            found |= {f"optimizer/{key}/{name}": lazy_of(torch.rand_like(tensor)) for key in ("exp_avg", "exp_avg_sq")}
            found[f"optimizer/step/{name}"] = lazy_of(torch.tensor(5.0))
        state |= {
            "schedule": SCHEDULE,
            "scheduled_samples": 40,
            "loss_scale": {"scale": 8.0, "growth_tracker": 3, "hysteresis_tracker": 1},
        }
    return Weights(config=RunConfig().replace(**(SMALL | changes)), tensors=found, iteration=5, train_state=state)


def assert_same_weights(one: Weights, other: Weights) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(swiglu=True, ffn_hidden_size=64, num_query_groups=2, normalization="RMSNorm", add_bias_linear=False,
             position_embedding_type="rope",             untie_embeddings_and_output_weights=True),
        dict(attention_head_type="multiquery", openai_gelu=True),
        dict(model_type="bert"),
        dict(model_type="bert_classification", num_classes=3),
        dict(model_type="bert_multiple_choice"),
    ],
    ids=["gpt", "llama", "multi-query", "bert", "bert classes", "bert choices"],
)  # fmt: skip
def test_round_trip(tmp_path: pathlib.Path, layout: str, changes: dict) -> None:
    weights = make_weights(**changes)
    FORMATS.find("megatron").write(weights, tmp_path / "m", MegatronOptions(**LAYOUTS[layout]))
    back = formats.read(tmp_path / "m")
    assert_same_weights(weights, back)
    assert back.iteration == 5 and back.train_state == weights.train_state
    assert (
        dataclasses.replace(back.config.model, ffn_hidden_size=None, kv_channels=None).activation
        == weights.config.model.activation
    )
    assert back.config.model.model_type == weights.config.model.model_type
    assert back.config.model.num_classes == changes.get("num_classes", 2)
    assert back.config.model.vocab_size == 96 and (tmp_path / "m/latest_checkpointed_iteration.txt").read_text() == "5"


HEADS = {"classification": "classification_head", "multiple_choice": "multichoice_head"}


@pytest.mark.parametrize(("kind", "head"), HEADS.items())
def test_heads_that_classify_are_beside_the_language_model(kind: str, head: str, tmp_path: pathlib.Path) -> None:
    """On the last stage, which has no copy of the word embeddings, as it has no output layer
    (megatron/model/classification.py).
    """
    weights = make_weights(model_type=f"bert_{kind}")
    FORMATS.find("megatron").write(weights, tmp_path / "m", MegatronOptions(pipeline_model_parallel_size=2))
    files = sorted((tmp_path / "m").rglob("model_optim_rng.pt"))
    first, last = (torch.load(file, weights_only=False)["model"] for file in files)
    assert set(first) == {"language_model"} and set(last) == {"language_model", head}
    assert torch.equal(last[head]["weight"], weights["model/classifier.weight"])
    assert set(last["language_model"]["pooler"]) == {"dense.weight", "dense.bias"}


def test_through_ours_and_another_layout_equals_the_direct_way(tmp_path: pathlib.Path) -> None:
    weights, megatron = make_weights(swiglu=True, ffn_hidden_size=64), FORMATS.find("megatron")
    four = MegatronOptions(tensor_model_parallel_size=4, dtype="bfloat16")
    megatron.write(weights, tmp_path / "direct", four)
    megatron.write(weights, tmp_path / "a", MegatronOptions(**LAYOUTS["tp2 pp2"]))
    write_own(formats.read(tmp_path / "a"), tmp_path / "b")
    megatron.write(read_megalith(tmp_path / "b"), tmp_path / "around", four)
    for file in sorted((tmp_path / "direct").rglob("*.pt")):
        one, other = (
            torch.load(path, weights_only=False)
            for path in (file, tmp_path / "around" / file.relative_to(tmp_path / "direct"))
        )
        assert str(one["model"]) == str(other["model"]) and vars(one["args"]) == vars(other["args"])


def test_hugging_face_by_way_of_megatron_equals_the_direct_export(tmp_path: pathlib.Path) -> None:
    llama = dict(
        swiglu=True, ffn_hidden_size=64, num_query_groups=2, normalization="RMSNorm", add_bias_linear=False,
        hidden_dropout=0.0, position_embedding_type="rope", untie_embeddings_and_output_weights=True,
        attention_dropout=0.0,
    )  # fmt: skip
    weights, huggingface = make_weights(**llama), FORMATS.find("huggingface")
    huggingface.write(weights, tmp_path / "direct", HuggingFaceOptions())
    FORMATS.find("megatron").write(weights, tmp_path / "megatron", MegatronOptions(**LAYOUTS["tp2 pp2"]))
    write_own(formats.read(tmp_path / "megatron"), tmp_path / "ours")
    huggingface.write(read_megalith(tmp_path / "ours"), tmp_path / "around", HuggingFaceOptions())
    name = "model.safetensors"
    assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "around" / name).read_bytes()


@pytest.mark.parametrize("chunk", [0, 3, 8])
def test_a_virtual_stage_that_does_not_divide_is_refused(tmp_path: pathlib.Path, chunk: int) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"virtual-pipeline-stage must divide the 4 layers of a stage \(1, 2, 4\); found {chunk}\. Take one",
    ):
        FORMATS.find("megatron").write(
            make_weights(), tmp_path / "m", MegatronOptions(num_layers_per_virtual_pipeline_stage=chunk)
        )


def test_models_that_megatron_does_not_have_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"sliding_window has no counterpart in Megatron's legacy models, which .* something else; found 8\.",
    ):
        FORMATS.find("megatron").write(make_weights(sliding_window=8), tmp_path / "m", MegatronOptions())
    with pytest.raises(CheckpointError, match=r"scale_embeddings has no counterpart .*; found True"):
        FORMATS.find("megatron").write(make_weights(scale_embeddings=True), tmp_path / "m", MegatronOptions())
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["one", "tp2 pp2 virtual"])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_optimizer_round_trip(tmp_path: pathlib.Path, layout: str, dtype: str, distributed: bool, kind: str) -> None:
    """Moments, steps and the float32 weights are exact whatever the format of the weights."""
    weights = make_weights(optimizer=True, model_type=kind)
    options = MegatronOptions(
        **LAYOUTS[layout], dtype=dtype, use_distributed_optimizer=distributed, data_parallel_size=3, with_optimizer=True
    )
    FORMATS.find("megatron").write(weights, tmp_path / "m", options)
    back = formats.read(tmp_path / "m", options=dict(with_optimizer=True))
    assert_same_weights(weights, back)
    scale = weights.train_state["loss_scale"] if dtype == "float16" else {"scale": 1.0}
    assert back.train_state == {**weights.train_state, "loss_scale": scale}
    plain = formats.read(tmp_path / "m")
    assert not any(name.startswith("optimizer/") for name in plain) and plain[
        "model/embedding.weight"
    ].dtype == getattr(torch, dtype)


def test_torch_and_megatron_find_what_they_expect(tmp_path: pathlib.Path) -> None:
    FORMATS.find("megatron").write(
        make_weights(optimizer=True), tmp_path / "m", MegatronOptions(**LAYOUTS["tp2 pp2"], with_optimizer=True)
    )
    place = tmp_path / "m/iter_0000005"
    assert sorted(path.name for path in place.iterdir()) == [
        "mp_rank_00_000",
        "mp_rank_00_001",
        "mp_rank_01_000",
        "mp_rank_01_001",
    ]
    first, last = (
        torch.load(place / f"mp_rank_00_00{stage}/model_optim_rng.pt", weights_only=False) for stage in (0, 1)
    )
    assert list(first) == ["args", "checkpoint_version", "iteration", "model", "optimizer", "opt_param_scheduler"]
    assert (
        first["args"].padded_vocab_size == 256
        and first["args"].orig_vocab_size == 96
        and first["args"].ffn_hidden_size == 128
    )
    words = first["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    assert words.shape == (128, 32) and torch.equal(words, last["model"]["word_embeddings_for_head"]["weight"])
    assert torch.equal(words[96:], words[95:96].expand(32, 32)), "dummy words are copies of the last"
    assert (
        "layers.1.mlp.dense_4h_to_h.bias" in last["model"]["language_model"]["encoder"]
        and "embedding" not in last["model"]["language_model"]
    )
    groups, state = first["optimizer"]["param_groups"], first["optimizer"]["state"]
    assert [len(group["params"]) for group in groups] == [2 + 2 * 4, 2 * 8] and [
        group["wd_mult"] for group in groups
    ] == [1.0, 0.0]
    assert state[0]["exp_avg"].shape == (128, 32) and not state[0]["exp_avg"][96:].any()


@pytest.mark.parametrize(
    "layout, message",
    [
        (
            dict(tensor_model_parallel_size=3),
            r"attention heads must be a multiple of the number .* \(3\); found 4\. Take a number of ranks",
        ),
        (
            dict(pipeline_model_parallel_size=3),
            "--pipeline-model-parallel-size must give each of 3 stages of the model as many of its 4 layers; found 3",
        ),
        (
            dict(with_optimizer=True),
            "The optimizer must have exp_avg and exp_avg_sq of every parameter, .*; found nothing",
        ),
    ],
)
def test_layouts_that_cannot_be(tmp_path: pathlib.Path, layout: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        FORMATS.find("megatron").write(make_weights(), tmp_path / "m", MegatronOptions(**layout))


def test_optimizer_in_an_unknown_order_is_refused(tmp_path: pathlib.Path) -> None:
    FORMATS.find("megatron").write(make_weights(optimizer=True), tmp_path / "m", MegatronOptions(with_optimizer=True))
    file = tmp_path / "m/iter_0000005/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["optimizer"]["param_groups"].reverse()
    torch.save(content, file)
    with pytest.raises(
        CheckpointError, match=r"must have its parameters in the known order; found .*\. Take the weights alone"
    ):
        formats.read(tmp_path / "m", options=dict(with_optimizer=True))
    del content["optimizer"]
    torch.save(content, file)
    with pytest.raises(
        CheckpointError,
        match=r"optimizer in .* saved without it \(--no-save-optim, a release\); found nothing\. Take the weights",
    ):
        formats.read(tmp_path / "m", options=dict(with_optimizer=True))


def test_files_are_written_piece_by_piece(tmp_path: pathlib.Path) -> None:
    whole = torch.arange(6.0)
    room = Placeholder((2, 3), torch.float16, ((0, lambda: whole[:3]), (3, lambda: whole[3:])))
    save(tmp_path / "x.pt", {"a": [room, {"b": Placeholder((), torch.int64, ((0, lambda: torch.tensor(7)),))}], "n": 1})
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["a"][0], whole.view(2, 3).half()) and found["a"][1]["b"] == 7 and found["n"] == 1
    assert torch.equal(load_file(tmp_path / "x.pt")[0]["a"][0].read(), whole.view(2, 3).half())


def write_shards_of_2022(place: pathlib.Path, ranks: int) -> None:
    """Split distrib_optim.pt into optim.pt files, one of each data-parallel rank, as Megatron of 2022 wrote them."""
    file = place / "mp_rank_00/distrib_optim.pt"
    flat = torch.load(file, weights_only=False)[0][torch.float32]
    main = place / "mp_rank_00/model_optim_rng.pt"
    content = torch.load(main, weights_only=False)
    language = content["model"]["language_model"]
    parameters = [("embedding", name, part["weight"]) for name, part in language["embedding"].items()]
    parameters += [("encoder", name, tensor) for name, tensor in language["encoder"].items()]
    places, first = {}, 0
    for _, name, tensor in reversed(parameters):
        places[name] = (first, first + tensor.numel())
        first += tensor.numel()
    size = -(-first // ranks)
    for rank in range(ranks):
        groups: list[list] = [[], []]
        for _, name, tensor in parameters:
            begin, end = max(places[name][0], rank * size), min(places[name][1], (rank + 1) * size)
            if begin < end:
                groups[tensor.dim() == 1].append((begin, end))
        ids = iter(range(len(parameters)))
        described = [{"params": [next(ids) for _ in group], "step": 5} for group in groups if group]
        pieces = [piece for group in groups for piece in group]
        state = {
            number: {key: flat[key][b:e].clone() for key in ("exp_avg", "exp_avg_sq")}
            for number, (b, e) in enumerate(pieces)
        }
        masters = [[flat["param"][b:e].clone() for b, e in group] for group in groups if group]
        path = place / f"mp_rank_00_{rank:03d}"
        path.mkdir()
        inner = {"state": state, "param_groups": described}
        torch.save({"optimizer": {"optimizer": inner, "shard_fp32_from_float16_groups": masters}}, path / "optim.pt")
    file.unlink()
    del content["optimizer"]
    main.unlink()
    torch.save(content, place / "mp_rank_00/model_rng.pt")


def test_the_distributed_optimizer_of_2022(tmp_path: pathlib.Path) -> None:
    weights = make_weights(optimizer=True)
    FORMATS.find("megatron").write(
        weights, tmp_path / "m", MegatronOptions(dtype="bfloat16", use_distributed_optimizer=True, with_optimizer=True)
    )
    write_shards_of_2022(tmp_path / "m/iter_0000005", 3)
    assert_same_weights(weights, formats.read(tmp_path / "m", options=dict(with_optimizer=True)))
    (tmp_path / "m/iter_0000005/mp_rank_00_002/optim.pt").unlink()
    with pytest.raises(CheckpointError, match="must have its parameters in the known order"):
        formats.read(tmp_path / "m", options=dict(with_optimizer=True))
