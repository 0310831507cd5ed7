"""Megatron core's torch_dist folders: one written by it gives its numbers; all kinds of tensors come back."""

import json
import pathlib
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megalith.checkpoint import formats
from megalith.checkpoint.formats.megatron.dist import _unflatten
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.common.errors import CheckpointError
from megalith.models.gpt import GPT
from tests.checkpoint.formats.megatron.test_megatron_legacy import FILES, FLAGS, check_import, needs_files
from tests.checkpoint.megatron_files import fused_qkv, model_of, namespace

CORE = {  # within a layer
    "attention_norm": "self_attention.linear_qkv.layer_norm_{}", "mlp_norm": "mlp.linear_fc1.layer_norm_{}",
    "attention.out": "self_attention.linear_proj.{}", "mlp.up": "mlp.linear_fc1.{}", "mlp.down": "mlp.linear_fc2.{}",
}  # fmt: skip
ENDS = {
    "embedding": "embedding.word_embeddings.{}",
    "position_embedding": "embedding.position_embeddings.{}",
    "final_norm": "decoder.final_layernorm.{}",
}


def core_state(config, tensors: dict, local: bool = False) -> dict:
    """Our tensors under Megatron core's names, layers stacked."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem in ENDS:
            found[ENDS[stem].format(kind)] = tensor
    found["embedding.word_embeddings.weight"] = torch.cat(
        [found["embedding.word_embeddings.weight"], torch.ones(32, 32)]
    )
    names = dict(CORE, attention_norm="input_layernorm.{}", mlp_norm="pre_mlp_layernorm.{}") if local else CORE
    for kind in ("weight", "bias"):
        for name, core_name in names.items():
            found[f"decoder.layers.{core_name.format(kind)}"] = torch.stack(
                [tensors[f"layers.{i}.{name}.{kind}"] for i in range(4)]
            )
        qkv = [
            fused_qkv(*(tensors[f"layers.{i}.attention.{x}.{kind}"] for x in "qkv"), config, 1, 0, 3.0)
            for i in range(4)
        ]
        found[f"decoder.layers.self_attention.linear_qkv.{kind}"] = torch.stack(qkv)
    return found


def save(folder: pathlib.Path, state: dict, content: dict | None) -> pathlib.Path:
    place = folder / "iter_0000007"
    place.mkdir(parents=True)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(place), no_dist=True)
    (place / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    if content is not None:
        torch.save(content, place / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


@needs_files
def test_megatron_cores_own_folder_gives_its_logits_and_gradients() -> None:
    from tests.checkpoint.core_reference import compare

    weights = formats.read(FILES / "core_gpt/torch_dist", options=dict(overrides=FLAGS))
    compare(weights, GPT, FILES / "core_gpt/reference.npz")


@pytest.mark.parametrize("local", [False, True], ids=["Transformer Engine", "local"])
def test_weights_and_optimizer(tmp_path: pathlib.Path, local: bool) -> None:
    config, tensors = model_of()
    state = {key: tensor.bfloat16() for key, tensor in core_state(config, tensors, local).items()}
    for prefix, change in {"exp_avg": 1, "exp_avg_sq": 2, "fp32_param": 0}.items():
        state |= {
            f"optimizer.state.{prefix}.{key}": each + change for key, each in core_state(config, tensors, local).items()
        }
    scheduler = {"max_lr": 0.1, "num_steps": 70}
    optimizer = {"optimizer": {"param_groups": [{"step": 7, "params": []}]}}
    content = {
        "args": namespace(config, 1, 1, 128, {}),
        "iteration": 7,
        "checkpoint_version": 3.0,
        "optimizer": optimizer,
        "opt_param_scheduler": scheduler,
    }
    save(tmp_path / "c", state, content)
    assert formats.recognise(tmp_path / "c") == "torch_dist"
    weights = formats.read(tmp_path / "c", options=dict(with_optimizer=True))
    for name, tensor in tensors.items():
        assert torch.equal(weights[f"model/{name}"], tensor), name
        assert torch.equal(weights[f"optimizer/exp_avg/{name}"], tensor + 1) and torch.equal(
            weights[f"optimizer/exp_avg_sq/{name}"], tensor + 2
        )
        assert weights[f"optimizer/step/{name}"] == 7
    assert weights.train_state["schedule"] == {"lr": 0.1} and weights.train_state["scheduled_samples"] == 70
    plain = formats.read(tmp_path / "c/iter_0000007")
    assert plain["model/embedding.weight"].dtype == torch.bfloat16 and len(plain) == len(tensors)


def test_core_in_the_directories_of_old(tmp_path: pathlib.Path) -> None:
    """--ckpt-format torch: flat names, a shard for each rank, and on the last stage a copy of the embedding.

    The copy is called output_layer.
    """
    config, tensors = model_of()
    for stage in range(2):
        for rank in range(2):
            model = {}
            for name, whole in core_state(config, tensors, local=True).items():
                cut = 1 if name.endswith(("linear_proj.weight", "fc2.weight")) else 0
                split = cut == 1 or any(word in name for word in ("linear_fc1", "word_embeddings"))
                if ".layers." in name:
                    for local in range(2):
                        part = whole[2 * stage + local]
                        place = name.replace(".layers.", f".layers.{local}.")
                        if "linear_qkv" in name:
                            kind = name.rpartition(".")[2]
                            each = [tensors[f"layers.{2 * stage + local}.attention.{x}.{kind}"] for x in "qkv"]
                            model[place] = fused_qkv(*each, config, 2, rank, 3.0)
                        else:
                            model[place] = part.chunk(2, cut)[rank].clone() if split else part.clone()
                elif name.startswith("embedding.") == (stage == 0):
                    model[name] = whole.chunk(2)[rank].clone() if split else whole
                model["decoder.layers.0.self_attention._extra_state"] = torch.zeros(3)
            if stage == 1:
                model["output_layer.weight"] = core_state(config, tensors)["embedding.word_embeddings.weight"].chunk(2)[
                    rank
                ]
            args = namespace(config, 2, 2, 128, {"untie_embeddings_and_output_weights": False})
            path = tmp_path / f"iter_0000007/mp_rank_{rank:02d}_{stage:03d}"
            path.mkdir(parents=True)
            torch.save(
                {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": model}, path / "model_optim_rng.pt"
            )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    check_import(tmp_path, config, tensors)


def test_fragments_that_were_stored_flat() -> None:
    whole = torch.arange(2.0 * 6 * 8).view(2, 6, 8)
    stored = torch.stack(
        [
            torch.stack([torch.stack([part.flatten() for part in row.chunk(2, -1)]) for row in layer.chunk(3)])
            for layer in whole
        ]
    )
    assert stored.shape == (2, 3, 2, 8) and torch.equal(_unflatten(Lazy.of(stored), (2, 6, 8)).read(), whole)


def test_errors(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    state = core_state(config, tensors) | {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg": torch.ones(3)}
    folder = save(tmp_path / "c", state, {"args": namespace(config, 1, 1, 128, {}), "iteration": 7})
    with pytest.raises(
        CheckpointError,
        match=r"The optimizer in .* must not be stored as flat buffers, .*; found flat buffers",
    ):
        formats.read(folder, options=dict(with_optimizer=True))
    with pytest.raises(
        CheckpointError, match=r"--ckpt-step must name an iteration whose folder in .* holds .metadata; found 8\."
    ):
        formats.read(folder, "torch_dist", dict(iteration=8))
    kind = folder / "iter_0000007/metadata.json"
    kind.write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(
        CheckpointError,
        match=r"sharded_backend in .* must be torch_dist, .*; found 'zarr'\. Save it once more with --ckpt-format",
    ):
        formats.read(folder)
    kind.write_text(json.dumps({"sharded_backend": "torch_dist"}))
    index = folder / "iter_0000007/.metadata"
    data = next(folder.rglob("*.distcp"))
    data.rename(data.with_suffix(".away"))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp cannot be read"):
        formats.read(folder)
    index.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(
        CheckpointError, match=r"\.metadata asks for code, which a file of weights has no use for.*; found 'os.system'"
    ):
        formats.read(folder)
    index.write_bytes(pickle.dumps(3))
    with pytest.raises(
        CheckpointError, match=r"must have embedding.word_embeddings.weight, as every model of Megatron"
    ):
        formats.read(folder)
