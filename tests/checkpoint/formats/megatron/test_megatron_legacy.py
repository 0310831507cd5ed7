"""Megatron directories of every version and layout give the tensors that they were made of."""

import os
import pathlib
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch

from megalith.checkpoint import formats
from megalith.checkpoint.weights import write as write_own
from megalith.common.errors import CheckpointError
from megalith.models.gpt import GPT
from tests.checkpoint import megatron_files
from tests.checkpoint.megatron_files import foreign, model_of

ROOT = pathlib.Path(__file__).parents[4]
FILES = ROOT.parent / "shared/data/megatron/models"
needs_files = pytest.mark.skipif(not FILES.is_dir(), reason="needs the Megatron files of ../shared/data")
FLAGS = dict(num_attention_heads=4, openai_gelu=False)  # what files without arguments do not say


def check_import(folder, config, tensors, **options) -> formats.Weights:
    """Import and compare, config and every bit."""
    weights = formats.read(folder, options=options)
    assert {name.removeprefix("model/") for name in weights} == set(tensors)
    for name, tensor in tensors.items():
        lazy = weights.tensors[f"model/{name}"]
        assert lazy.shape == tensor.shape and torch.equal(lazy.read(), tensor), name
    found = weights.config.model
    for name in (
        "num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size",
        "activation", "head_activation", "norm", "positions", "add_bias_linear", "untie_embeddings_and_output_weights",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(config, name), name
    return weights


ENUMS = "megatron.model.enums"
LAYOUTS = {
    "one": {},
    "tp2": dict(tensor=2),
    "pp2": dict(pipeline=2),
    "tp2 pp2": dict(tensor=2, pipeline=2),
    "vpp": dict(tensor=2, pipeline=2, virtual=2),
}
VERSIONS = [(0.0, 2019), (1.0, 2019), (2.0, 2022), (3.0, 2022), (3.0, 2023), ("thirds", 2022)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version, year", VERSIONS)
def test_versions_and_layouts(tmp_path: pathlib.Path, layout: str, version, year: int) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(
        tmp_path / "m", config, tensors, **LAYOUTS[layout], version=version, year=year, args={}
    )
    weights = check_import(folder, config, tensors, qkv_layout="thirds" if version == "thirds" else "auto")
    assert weights.iteration == 7 and weights.train_state == {
        "iteration": 7,
        "consumed_train_samples": 56,
        "consumed_valid_samples": 8,
    }
    assert weights.config.data.seq_length == 16 and weights.config.optimizer.lr == 1e-3


FORMS: dict[str, tuple[dict, dict, dict]] = {
    "bert": (dict(model_type="bert"), dict(bias_gelu_fusion=False), {}),
    "bert of 2019": (dict(model_type="bert"), {}, dict(version=0.0, year=2019)),
    "bert of 2023": (dict(model_type="bert"), {}, dict(year=2023)),
    "grouped queries": (dict(num_query_groups=2, group_query_attention=True), {}, {}),
    "multi-query": (dict(attention_head_type="multiquery"), dict(attention_head_type="multiquery"), {}),
    "untied": (dict(untie_embeddings_and_output_weights=True), dict(untie_embeddings_and_output_weights=True), {}),
    "wide heads": (dict(kv_channels=16), {}, {}),
    "fused GELU": (dict(bias_gelu_fusion=True), dict(bias_gelu_fusion=True), {}),
    "OpenAI's GELU": (dict(openai_gelu=True), dict(openai_gelu=True), {}),
    "bert with fused GELU": (dict(model_type="bert", bias_gelu_fusion=True), dict(bias_gelu_fusion=True), {}),
    "no positions": (dict(position_embedding_type="rope"), dict(use_rotary_position_embeddings=True), {}),
    "alibi": (dict(position_embedding_type="alibi"),
              dict(position_embedding_type=foreign(ENUMS, "PositionEmbeddingType", 3)), {}),
    "swiglu": (dict(swiglu=True, ffn_hidden_size=64), dict(swiglu=True), {}),
    "swiglu of the fork": (dict(glu_activation="swiglu", ffn_hidden_size=64), dict(glu_activation="swiglu"),
                           dict(gate_first=False)),
    "llama": (
        dict(swiglu=True, ffn_hidden_size=64, normalization="RMSNorm", add_bias_linear=False, num_query_groups=2,
             position_embedding_type="rope", untie_embeddings_and_output_weights=True, group_query_attention=True),
        dict(swiglu=True, use_rotary_position_embeddings=True, num_key_value_heads=2, normalization="rmsnorm",
             untie_embeddings_and_output_weights=True),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["one", "tp2", "vpp"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: pathlib.Path, form: str, layout: str) -> None:
    changes, args, how = FORMS[form]
    config, tensors = model_of(**changes)
    check_import(
        megatron_files.write(tmp_path / "m", config, tensors, **LAYOUTS[layout], args=args, **how), config, tensors
    )


def test_order_of_gated_halves_is_an_option(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of(swiglu=True, ffn_hidden_size=64)
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, args=dict(swiglu=True), gate_first=False)
    check_import(folder, config, tensors, swiglu_order="gate-second")
    swapped = formats.read(folder)
    assert torch.equal(swapped["model/layers.0.mlp.gate.weight"], tensors["layers.0.mlp.up.weight"])


def test_what_only_arguments_say(tmp_path: pathlib.Path) -> None:
    """Features that no shape shows, an enum by its name as Python 3.11 pickled it, and what our models cannot be."""
    config, tensors = model_of(position_embedding_type="rope")
    args = dict(
        position_embedding_type="rope", use_rope_scaling=True, rope_scaling_factor=4.0, rotary_base=5e5,
        window_size=(7, 0), qk_layernorm=False,
        train_samples=640, train_iters=20, split="90,5,5", loss_scale="many", bf16=True,
    )  # fmt: skip
    weights = formats.read(megatron_files.write(tmp_path / "a", config, tensors, args=args))
    model = weights.config.model
    assert (model.rope_scaling_type, model.rope_scaling_factor, model.rotary_base, model.sliding_window) == (
        "llama3",
        4.0,
        5e5,
        8,
    )
    assert model.full_attention_layers == []
    (
        more := args
        | {"rotary_seq_len_interpolation_factor": 2, "num_experts": 1, "rope_type": "rope", "qk_l2_norm": False}
    ).pop("use_rope_scaling")
    stretched = formats.read(megatron_files.write(tmp_path / "stretched", config, tensors, args=more)).config.model
    assert (stretched.rope_scaling_type, stretched.rope_scaling_factor) == ("linear", 2.0)
    for skip, full in ((2, [1, 3]), (3, [2]), ([1, 0, 1, 1], [1])):
        skipped = formats.read(
            megatron_files.write(tmp_path / f"{skip}", config, tensors, args=args | {"window_attn_skip_freq": skip})
        )
        assert skipped.config.model.full_attention_layers == full
    assert (
        weights.config.schedule.train_samples == 640
        and weights.config.schedule.train_iters is None
        and weights.config.precision.bf16
    )
    note = (
        "loss_scale: 'many' has no counterpart here and was left out; nothing is to be done if that is right, "
        "else give --loss-scale"
    )
    assert note in weights.notes
    less = {name: tensor - 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}
    shifted = formats.read(megatron_files.write(tmp_path / "b", config, less, args=args | {"apply_layernorm_1p": True}))
    assert shifted.config.model.norm == "layernorm"
    assert all(torch.allclose(shifted[f"model/{name}"], tensor, atol=1e-6) for name, tensor in tensors.items())


def test_without_arguments_what_is_assumed_is_said(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, version=0.0, year=2019, iteration=None)
    with pytest.raises(
        CheckpointError,
        match=r"attention heads must be given, .* holds no arguments .*; found nothing\. Give --num-attention-heads",
    ):
        formats.read(folder)
    weights = check_import(folder, config, tensors, overrides=FLAGS | {"vocab_size": 96})
    assert weights.iteration == 0 and any("the file holds no arguments; assumed" in note for note in weights.notes)
    with pytest.raises(CheckpointError, match=r"--vocab-size must fit into the 128 rows of the embedding; found 200"):
        formats.read(folder, options=dict(overrides=FLAGS | {"vocab_size": 200}))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("new", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["zip", "before 1.6"])
def test_the_zip_of_a_release(
    tmp_path: pathlib.Path, compression: int, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: save(*args, _use_new_zipfile_serialization=new))
    config, tensors = megatron_files.release(tmp_path / "megatron_lm_345m_v0.0.zip", 50257, 50304, compression)
    weights = check_import(tmp_path / "megatron_lm_345m_v0.0.zip", config, tensors)
    note = (
        "vocabulary: 50257 of 50304 rows, the size of a GPT2BPETokenizer; nothing is to be done if that is right, "
        "else give --vocab-size"
    )
    assert note in weights.notes
    assert weights.config.model.openai_gelu and weights.config.model.num_attention_heads == 8


CHILD = """
import sys
for name in ("megatron", "apex", "deepspeed", "transformer_engine", "mpu"):
    sys.modules[name] = None  # importing them fails
from megalith.checkpoint import formats
weights = formats.read(sys.argv[1])
assert len(list(map(weights.__getitem__, weights))) == 68, len(weights)
print(*weights.notes, sep="\\n")
"""


def test_pickled_classes_need_no_megatron(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    args = dict(
        position_embedding_type=foreign(ENUMS, "PositionEmbeddingType", 2),
        model_type=foreign("megatron.core.enums", "ModelType", 1), path=pathlib.Path("/x"),
    )  # fmt: skip
    extra = {
        "scaler": foreign("apex.fp16_utils.loss_scaler", "DynamicLossScaler", 4.0),
        "rng_state": [{"np_rng_state": numpy.random.get_state()}],
    }
    megatron_files.write(tmp_path / "m", config, tensors, tensor=2, pipeline=2, args=args, extra=extra)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "m")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (
        "apex.fp16_utils.loss_scaler.DynamicLossScaler, megatron.core.enums.ModelType, megatron.model.enums"
        in done.stdout
    )
    assert "random states were left out" in done.stdout


def test_pickled_classes_leave_no_module_behind(tmp_path: pathlib.Path) -> None:
    """A stand-in for megatron.core in sys.modules would hide the real one, the reference of tests/data, from later
    tests.
    """
    before = dict(sys.modules)
    megatron_files.save(foreign("megatron.core.enums", "ModelType", 1), tmp_path / "x.pt")
    assert {name: sys.modules[name] for name in before} == before
    assert not [name for name in sys.modules.keys() - before.keys() if name.split(".")[0] in ("megatron", "apex")]


@needs_files
def test_megatrons_own_file_gives_its_logits(tmp_path: pathlib.Path) -> None:
    weights = formats.read(FILES / "tp2pp1")
    assert weights.config.model.activation == "gelu" and weights.iteration == 5
    path = write_own(weights, tmp_path / "ours")
    from megalith.runtime.load import load_model

    model = load_model(path, device="cpu")[0]
    ids = torch.from_numpy(numpy.load(FILES / "reference/input_ids.npy"))
    logits = torch.from_numpy(numpy.load(FILES / "reference/logits_megatron2022.npy"))
    losses = torch.from_numpy(numpy.load(FILES / "reference/token_losses_megatron2022.npy"))
    with torch.no_grad():
        assert (model(ids) - logits).abs().max() < 1e-5
        assert (model(ids, labels=ids.roll(-1, dims=1)) - losses).abs().max() < 1e-5


@needs_files
def test_megatron_cores_flat_file_gives_its_logits_and_gradients() -> None:
    from tests.checkpoint.core_reference import compare

    compare(
        formats.read(FILES / "core_gpt/state_dict.pt", options=dict(overrides=FLAGS)),
        GPT,
        FILES / "core_gpt/reference.npz",
    )
