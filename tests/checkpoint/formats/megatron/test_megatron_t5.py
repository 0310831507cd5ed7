"""Megatron's T5: an encoder and a decoder, with queries apart from keys and values in cross attention."""

import pathlib

import pytest
import torch

from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, MegatronOptions
from megalith.common.errors import CheckpointError
from tests.checkpoint.formats.megatron.test_megatron_legacy import check_import
from tests.checkpoint.formats.megatron.test_megatron_write import assert_same_weights, make_weights
from tests.checkpoint.megatron_files import SPELLINGS, layer_tensors, model_of, namespace

T5 = dict(model_type="t5", num_layers=2, decoder_num_layers=4)


def cross_rows(
    k: torch.Tensor, v: torch.Tensor, ranks: int, rank: int, version: float, heads: int = 4, d: int = 8
) -> torch.Tensor:
    """The rows of key_value that a rank holds."""
    rank_heads = range(rank * heads // ranks, (rank + 1) * heads // ranks)
    if version == 1.0:
        return torch.stack([each[head * d + channel] for head in rank_heads for channel in range(d) for each in (k, v)])
    if version == 0.0:
        return torch.stack([each[head * d + channel] for each in (k, v) for head in rank_heads for channel in range(d)])
    return torch.stack([each[head * d + channel] for head in rank_heads for each in (k, v) for channel in range(d)])


def write(folder: pathlib.Path, ranks: int, version: float, year: int):
    """A directory of a T5 made by hand, one stage."""
    config, tensors = model_of(**T5)
    spelling = SPELLINGS[year]
    for rank in range(ranks):
        stacks: dict[str, dict] = {"encoder": {}, "decoder": {}}
        for number in range(6):
            stack, local = ("encoder", number) if number < 2 else ("decoder", number - 2)
            without_cross = {name: tensor for name, tensor in tensors.items() if "cross_" not in name}
            part = {
                name.format(local): each
                for name, each in layer_tensors(
                    without_cross, number, config, ranks, rank, version, spelling, True
                ).items()
            }
            if stack == "decoder":
                for kind in ("weight", "bias"):
                    q, k, v, out = (
                        tensors[f"layers.{number}.cross_attention.{each}.{kind}"] for each in ("q", "k", "v", "out")
                    )
                    mlp_norm = part.pop(f"layers.{local}.post_attention_{spelling['norm']}.{kind}")
                    part |= {
                        f"layers.{local}.post_attention_{spelling['norm']}.{kind}": tensors[
                            f"layers.{number}.cross_norm.{kind}"
                        ],
                        f"layers.{local}.inter_attention.query.{kind}": q.chunk(ranks)[rank],
                        f"layers.{local}.inter_attention.key_value.{kind}": cross_rows(k, v, ranks, rank, version),
                        f"layers.{local}.inter_attention.dense.{kind}": out.chunk(ranks, 1)[rank]
                        if kind == "weight"
                        else out,
                        f"layers.{local}.post_inter_attention_{spelling['norm']}.{kind}": mlp_norm,
                    }
            stacks[stack] |= part
        for stack, norm in (("encoder", "encoder_norm"), ("decoder", "final_norm")):
            stacks[stack] |= {
                f"final_{spelling['norm']}.{kind}": tensors[f"{norm}.{kind}"] for kind in ("weight", "bias")
            }
        words = torch.cat([tensors["embedding.weight"], torch.ones(32, 32)]).chunk(ranks)[rank]
        positions = {"weight": tensors["position_embedding.weight"]}
        language = {"embedding": {"word_embeddings": {"weight": words}, "position_embeddings": positions}, **stacks}
        model = {
            "language_model": language,
            "lm_head": {"bias": torch.cat([tensors["head.bias"], torch.zeros(32)]).chunk(ranks)[rank]},
        }
        content = {
            "model": model,
            "args": namespace(config, ranks, 1, 128, {}),
            "iteration": 7,
            "checkpoint_version": version,
        }
        path = folder / f"iter_0000007/mp_rank_{rank:02d}"
        path.mkdir(parents=True)
        torch.save(content, path / "model_optim_rng.pt")
    return config, tensors


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("version, year", [(0.0, 2022), (1.0, 2022), (3.0, 2022), (3.0, 2023)])
def test_import(tmp_path: pathlib.Path, ranks: int, version: float, year: int) -> None:
    config, tensors = write(tmp_path, ranks, version, year)
    weights = check_import(tmp_path, config, tensors)
    assert weights.config.model.decoder_layers == 4 and weights.config.data.dataset == "t5"


def test_layers_missing_of_a_decoder_that_arguments_do_not_count(tmp_path: pathlib.Path) -> None:
    """Before decoder_num_layers there was num_layers, of both stacks."""
    write(tmp_path, 1, 3.0, 2022)
    (file,) = tmp_path.rglob("model_optim_rng.pt")
    content = torch.load(file, weights_only=False)
    content["args"].decoder_num_layers = None
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="decoder_num_layers: the tensors have 4, the arguments say 2"):
        formats.read(tmp_path)
    given = dict(overrides=dict(decoder_num_layers=4))
    assert formats.read(tmp_path, options=given).config.model.decoder_layers == 4


@pytest.mark.parametrize("pipeline", [1, 3])
def test_round_trip(tmp_path: pathlib.Path, pipeline: int) -> None:
    """Three stages: one of the encoder, two of the decoder, the first of which has its own embedding."""
    weights = make_weights(optimizer=True, **T5)
    options = MegatronOptions(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=pipeline, with_optimizer=True, dtype="bfloat16"
    )
    FORMATS.find("megatron").write(weights, tmp_path / "m", options)
    assert_same_weights(weights, formats.read(tmp_path / "m", options=dict(with_optimizer=True)))
    if pipeline == 3:
        models = [
            torch.load(tmp_path / f"m/iter_0000005/mp_rank_00_00{n}/model_optim_rng.pt", weights_only=False)
            for n in range(3)
        ]
        parts = [sorted(each["model"]["language_model"]) for each in models]
        assert (
            parts == [["embedding", "encoder"], ["decoder", "embedding"], ["decoder"]]
            and models[0]["args"].pipeline_model_parallel_split_rank == 1
        )
        assert (
            "lm_head" in models[2]["model"]
            and "final_layernorm.bias" in models[0]["model"]["language_model"]["encoder"]
        )


def test_what_megatron_cannot_hold_is_refused(tmp_path: pathlib.Path) -> None:
    message = "must give each of 2 stages of the decoder as many of its 3 layers"
    with pytest.raises(CheckpointError, match=message):
        layout = MegatronOptions(pipeline_model_parallel_size=3)
        FORMATS.find("megatron").write(
            make_weights(model_type="t5", num_layers=2, decoder_num_layers=3), tmp_path / "m", layout
        )
    with pytest.raises(
        CheckpointError, match=r"has no counterpart in Megatron's legacy|must have a counterpart in Megatron's model"
    ):
        FORMATS.find("megatron").write(
            make_weights(**T5, position_embedding_type="relative"), tmp_path / "m", MegatronOptions()
        )
