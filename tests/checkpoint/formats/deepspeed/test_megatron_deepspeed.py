"""Folders of Megatron-DeepSpeed in its documented layout: weights and optimizer come back bit for bit."""

import pathlib

import pytest
import torch

from megalith.checkpoint import formats
from megalith.common.errors import CheckpointError
from tests.checkpoint import megatron_files
from tests.checkpoint.megatron_files import SPELLINGS, Tensors, layer_tensors, model_of, namespace

LLAMA = dict(swiglu=True, ffn_hidden_size=64, normalization="RMSNorm", add_bias_linear=False, num_query_groups=2,
             position_embedding_type="rope",
             group_query_attention=True, untie_embeddings_and_output_weights=True)  # fmt: skip
SAID = dict(
    swiglu=True, use_rotary_position_embeddings=True, num_key_value_heads=2, untie_embeddings_and_output_weights=True
)


def write_tree(
    folder: pathlib.Path, changes: dict, args: dict, ranks: int
) -> tuple[Tensors, list[dict[str, torch.Tensor]]]:
    """Without pipeline: (our tensors, the parameters of each rank under DeepSpeed's names)."""
    config, tensors = model_of(**changes)
    megatron_files.write(folder / "m", config, tensors, tensor=ranks, args=args)
    place = folder / "ds/global_step7"
    place.mkdir(parents=True)
    flat = []
    for rank in range(ranks):
        content = torch.load(folder / f"m/iter_0000007/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)
        module = content.pop("model")
        language = module["language_model"]
        named = {
            f"language_model.embedding.{name}.weight": part["weight"] for name, part in language["embedding"].items()
        }
        named |= {f"language_model.encoder.{name}": each for name, each in language["encoder"].items()}
        named |= (
            {"language_model.output_layer.weight": language["output_layer"]["weight"]}
            if "output_layer" in language
            else {}
        )
        flat.append(named)
        shapes = [
            {name: each.shape for name, each in named.items() if (each.dim() > 1) is wanted} for wanted in (True, False)
        ]
        torch.save(
            content | {"module": module, "param_shapes": shapes, "dp_world_size": 2, "optimizer": None},
            place / f"mp_rank_{rank:02d}_model_states.pt",
        )
    (folder / "ds/latest").write_text("global_step7")
    return tensors, flat


def write_zero_shards(
    place: pathlib.Path,
    flat: list[dict[str, torch.Tensor]],
    parts: int,
    elastic: bool,
    prefix: str,
    shapes: list[dict] | None = None,
) -> None:
    """Optimizer shards: exp_avg is the weight plus 1, exp_avg_sq its square."""
    for rank, named in enumerate(flat):
        groups = [[each for each in named.values() if (each.dim() > 1) is wanted] for wanted in (True, False)]
        buffers = [torch.cat([each.flatten() for each in group]) for group in groups]
        buffers = [torch.cat([each, torch.zeros(-len(each) % parts)]) for each in buffers]
        for part in range(parts):
            partition = [each.chunk(parts)[part].clone() for each in buffers]
            state = {
                number: {"step": 7, "exp_avg": each + 1, "exp_avg_sq": each**2} for number, each in enumerate(partition)
            }
            base = list(state.values()) if elastic else {"state": state, "param_groups": []}
            content = {
                "single_partition_of_fp32_groups": partition,
                "base_optimizer_state": base,
                "zero_stage": 1,
                "partition_count": [parts, parts],
            }
            file = f"{prefix}zero_pp_rank_{part}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": content, "ds_version": "0.14"}, place / file)


def check(folder: pathlib.Path, tensors: Tensors, optimizer: bool) -> formats.Weights:
    assert formats.recognise(folder) == "deepspeed"
    weights = formats.read(folder, options=dict(with_optimizer=optimizer))
    assert {name for name in weights if name.startswith("model/")} == {f"model/{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(weights[f"model/{name}"], tensor), name
        if optimizer:
            assert (
                torch.equal(weights[f"optimizer/exp_avg/{name}"], tensor + 1) and weights[f"optimizer/step/{name}"] == 7
            )
            assert torch.equal(weights[f"optimizer/exp_avg_sq/{name}"], tensor**2)
    assert weights.iteration == 7
    return weights


@pytest.mark.parametrize("parts, elastic, prefix", [(1, False, ""), (3, False, ""), (2, True, "bf16_")])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("changes, args", [({}, {}), (LLAMA, SAID)], ids=["gpt", "llama"])
def test_module_states_and_zero_shards(tmp_path, changes, args, ranks, parts, elastic, prefix) -> None:
    tensors, flat = write_tree(tmp_path, changes, args, ranks)
    write_zero_shards(tmp_path / "ds/global_step7", flat, parts, elastic, prefix)
    check(tmp_path / "ds", tensors, optimizer=True)
    check(tmp_path / "ds/global_step7", tensors, optimizer=False)


def write_pipelined(tmp_path: pathlib.Path, changes: dict, args: dict, ranks: int, first: int) -> Tensors:
    """Write a folder of layer files at `tmp_path`, with the optimizer, and return the model's tensors."""
    config, tensors = model_of(**changes)
    place = tmp_path / "global_step7"
    place.mkdir(parents=True)
    flat: list[Tensors] = []
    for rank in range(ranks):
        words = torch.cat([tensors["embedding.weight"], torch.zeros(32, 32)]).chunk(ranks)[rank]
        modules: dict[int, Tensors] = {first: {"word_embeddings.weight": words}}
        if "position_embedding.weight" in tensors:
            modules[first]["position_embeddings.weight"] = tensors["position_embedding.weight"]
        for number in range(4):
            parts = layer_tensors(tensors, number, config, ranks, rank, 3.0, SPELLINGS[2022], True)
            modules[first + 1 + number] = {name.removeprefix("layers.{}."): each for name, each in parts.items()}
        modules[first + 6] = {
            kind: tensors[f"final_norm.{kind}"] for kind in ("weight", "bias") if f"final_norm.{kind}" in tensors
        }
        if "head.weight" in tensors:
            modules[first + 7] = {
                "lm_head.weight": torch.cat([tensors["head.weight"], torch.zeros(32, 32)]).chunk(ranks)[rank]
            }
        else:
            modules[first + 7] = {"word_embeddings.weight": words}  # the tied copy
        for number, module in modules.items():
            torch.save(module, place / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        tied = "head.weight" not in tensors
        named = {
            (f"tied_modules.embed.{name}" if tied and number == first else f"{number}.{name}"): each
            for number, module in modules.items() for name, each in module.items() if not (tied and number == first + 7)
        }  # fmt: skip
        flat.append(named)
        shapes = [
            {name: each.shape for name, each in named.items() if (each.dim() > 1) is wanted} for wanted in (True, False)
        ]
        content = {
            "module": None,
            "args": namespace(config, ranks, 1, 128, args),
            "iteration": 7,
            "checkpoint_version": 3.0,
            "param_shapes": shapes,
        }
        torch.save(content, place / f"mp_rank_{rank:02d}_model_states.pt")
    write_zero_shards(place, flat, 2, False, "bf16_")
    (tmp_path / "latest").write_text("global_step7")
    return tensors


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("first", [1, 2], ids=["one module before", "two modules before"])
@pytest.mark.parametrize("changes, args", [({}, {}), (LLAMA, SAID)], ids=["gpt", "llama"])
def test_layer_files_of_a_pipeline(tmp_path: pathlib.Path, changes: dict, args: dict, ranks: int, first: int) -> None:
    check(tmp_path, write_pipelined(tmp_path, changes, args, ranks, first), optimizer=True)


def test_universal(tmp_path: pathlib.Path) -> None:
    """Parameters whole, the vocabulary without padding, beside the module states of two ranks."""
    tensors, _ = write_tree(tmp_path, {}, {}, 2)
    _, whole = write_tree(tmp_path / "whole", {}, {}, 1)
    for name, tensor in whole[0].items():
        place = tmp_path / "ds/global_step7/zero" / name
        place.mkdir(parents=True)
        tensor = tensor[:96] if "word_embeddings" in name else tensor
        for file, each in (("fp32", tensor), ("exp_avg", tensor + 1), ("exp_avg_sq", tensor**2)):
            torch.save({"param": each, "cat_dim": 0}, place / f"{file}.pt")
        torch.save(torch.tensor(7.0), place / "step.pt")
    check(tmp_path / "ds", tensors, optimizer=True)


def test_what_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    _, flat = write_tree(tmp_path, {}, {}, 2)
    place = tmp_path / "ds/global_step7"
    with pytest.raises(
        CheckpointError, match=r"optimizer in .* must be saved in zero_pp_rank_\*_optim_states.pt; found nothing\. Take"
    ):
        formats.read(tmp_path / "ds", options=dict(with_optimizer=True))
    with pytest.raises(
        CheckpointError,
        match=r"must hold a folder global_stepN .*; found \['global_step7'\]\. Name one with --ckpt-step",
    ):
        formats.read(tmp_path / "ds", "deepspeed", dict(iteration=9))
    write_zero_shards(place, flat, 3, False, "")
    (place / "zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"optimizer of mp_rank_01 in .* must be numbered from 0 without a gap; found \[0, 2\]",
    ):
        formats.read(tmp_path / "ds", options=dict(with_optimizer=True))
    (place / "zero_pp_rank_2_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"optimizer shards of mp_rank_01 in .* must be 3, as the files say; found 1\. Copy the missing",
    ):
        formats.read(tmp_path / "ds", options=dict(with_optimizer=True))
    (place / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"tensor-parallel ranks in .* must be all 2 ranks .*, with a file for each; found \[0\]"
    ):
        formats.read(tmp_path / "ds")
