"""Every way in which a Megatron directory can be broken has an error with the rule, what was found and the cure."""

import pathlib

import pytest
import torch

from megalith.checkpoint import formats
from megalith.common.errors import CheckpointError
from tests.checkpoint import megatron_files
from tests.checkpoint.megatron_files import model_of


def broken(folder: pathlib.Path, what: str) -> None:
    """Break a tp2 pp2 directory."""
    place = folder / "iter_0000007"
    first = place / "mp_rank_00_000/model_optim_rng.pt"
    content = torch.load(first, weights_only=False)
    encoder = content["model"]["language_model"]["encoder"]
    if what == "shard":
        (place / "mp_rank_01_001/model_optim_rng.pt").unlink()
    elif what == "tracker":
        (folder / "latest_checkpointed_iteration.txt").write_text("soon")
    elif what == "iteration":
        (folder / "latest_checkpointed_iteration.txt").write_text("9")
    elif what == "version":
        content["checkpoint_version"] = 7.0
    elif what == "heads":
        content["args"].num_attention_heads = 3
    elif what == "shape":
        encoder["layers.0.mlp.dense_4h_to_h.bias"] = torch.zeros(31)
    elif what == "name":
        encoder["layers.0.mlp.router.weight"] = torch.zeros(3)
    elif what == "experts":
        content["args"].num_experts = [8]
    elif what == "empty":
        content["model"] = {}
    if what in ("version", "heads", "shape", "name", "experts", "empty"):
        torch.save(content, first)


@pytest.mark.parametrize(
    "name, value",
    [("qk_l2_norm", True), ("rope_type", "yarn"), ("position_embedding_type", "mrope"), ("no_rope_freq", 4),
     ("mrope_section", [8, 4, 4]), ("final_logit_softcapping", 30.0), ("softmax_type", "learnable"),
     ("num_experts", [8])],
)  # fmt: skip
def test_arguments_that_change_the_model_without_a_tensor(tmp_path: pathlib.Path, name: str, value: object) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, args={name: value})
    flag = f"--{name.replace('_', '-')}"
    message = f"{flag} cannot be read, because .*; found .*. Train without it, or convert with its own tools"
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder)


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "shard",
            "must hold one folder for each rank of tensor parallel 2 x pipeline parallel 2, but mp_rank_01_001 is "
            "missing; found 3 of 4 ranks. Copy",
        ),
        (
            "tracker",
            "latest_checkpointed_iteration.txt must hold the number of an iteration, or `release`; found 'soon'. "
            "Name one: --ckpt-step N",
        ),
        ("iteration", r"iter_0000009/ does not exist; found the checkpoints \['iter_0000007/'\]\. Name one"),
        (
            "version",
            "checkpoint_version must be one of 0.0, 1.0, 2.0, 3.0; found 7.0. Name the order of rows: --qkv-layout",
        ),
        ("heads", r"query_key_value.weight must hold 3 heads of (8|10) channels .*; found \[48, 32\]"),
        (
            "shape",
            r"layers.0.mlp.dense_4h_to_h.bias of tensor-parallel rank 0: found \[31\], the model has \[32\] there",
        ),
        (
            "name",
            "Every parameter must belong to a model of Megatron that is known here; "
            "found 'encoder.layers.0.mlp.router.weight'",
        ),
        ("experts", "--num-experts cannot be read, because there are no mixture-of-experts layers here; found"),
        ("empty", r"must have embedding.word_embeddings.weight, as every .*; found .*Check that the checkpoint is"),
    ],
)
def test_errors_name_the_cure(tmp_path: pathlib.Path, what: str, message: str) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, pipeline=2, args={})
    broken(folder, what)
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder)
