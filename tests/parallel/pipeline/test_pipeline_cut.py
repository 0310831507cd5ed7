"""A stage is the model without the modules of other stages; all stages together compute what the model computes."""

import copy

import pytest
import torch

from megalith.parallel.pipeline.split import Cut, canonical_names
from megalith.runtime.build import build_model, meta_model
from tests.parity.cases import SMALL

LAYERS = [range(2), range(2, 3), range(3, 4)]


def cut_of(layers, config=SMALL):
    return Cut(config.model.architecture.find("stages"), layers, config.model)


def stages(config):
    cut, models = cut_of(LAYERS), []
    for stage in range(3):
        model = build_model(config.model, torch.device("cpu"), torch.float64, seed=1)
        cut.apply(model, stage)
        models.append(model)
    return models


@pytest.mark.parametrize("tied", [True, False])
def test_together_they_have_everything_once(tied):
    config = SMALL.replace(num_layers=4, untie_embeddings_and_output_weights=not tied)
    names = canonical_names(meta_model(config.model))
    found = [names[name] for model in stages(config) for name, _ in model.named_parameters()]
    assert sorted(found) == sorted([*set(names.values()), *["embedding.weight"] * tied])


def test_has_agrees_with_what_is_left():
    config = SMALL.replace(num_layers=4)
    names = canonical_names(meta_model(config.model))
    for stage, model in enumerate(stages(config)):
        left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert left == {name for name in names if cut_of(LAYERS).has(stage, name)}


def test_copies_of_a_tied_embedding():
    tied, untied = (
        canonical_names(meta_model(SMALL.replace(num_layers=4, untie_embeddings_and_output_weights=untie).model))
        for untie in (False, True)
    )
    copies_of = cut_of(LAYERS).copies(tied)
    assert copies_of.pop("embedding.weight") == [(0, "embedding.weight"), (2, "head.weight")]
    assert copies_of["layers.2.mlp.up.weight"] == [(1, "layers.2.mlp.up.weight")]
    assert all(len(copies) == 1 for copies in copies_of.values())
    assert all(len(copies) == 1 for copies in cut_of(LAYERS).copies(untied).values())
    assert cut_of([range(4)]).copies(tied)["embedding.weight"] == [(0, "embedding.weight")]


def test_one_stage_after_the_other_is_the_model():
    config = SMALL.replace(num_layers=4, position_embedding_type="rope")
    ids = torch.arange(32).view(2, 16)
    x = ids
    for model in stages(config):
        x = model(x, coordinates=torch.arange(16))
    # `build_model` drew the copy of the tied head under its own name; test_pipeline.py has initialize() with canonical
    # names.
    whole = build_model(config.model, torch.device("cpu"), torch.float64, seed=1)
    whole.head.weight = stages(config)[-1].head.weight
    torch.testing.assert_close(x, whole(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    "layers", [[range(2), range(2, 5)], [range(1), range(1, 3), range(3, 5)], [range(3), range(3, 5)]]
)
def test_one_stage_of_t5_after_the_other_is_the_model(layers):
    """Cut in the encoder, between the stacks, in the decoder; shared parameters are where they are needed."""
    config = SMALL.replace(model_type="t5", num_layers=2, decoder_num_layers=3, position_embedding_type="relative")
    whole = build_model(config.model, torch.device("cpu"), torch.float64, seed=1)
    cut, (source, target) = cut_of(layers, config), torch.arange(40).view(2, 20)[:, :16].unsqueeze(0).repeat(2, 1, 1)
    flow = (source,)
    names = canonical_names(meta_model(config.model))
    for stage in range(len(layers)):
        assert len(flow) == len(cut.received(stage))
        model = copy.deepcopy(whole)
        cut.apply(model, stage)
        assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == {
            name for name in names if cut.has(stage, name)
        }
        out = model(*flow, decoder_input_ids=target, coordinates=torch.arange(16))
        flow = out if isinstance(out, tuple) else (out,)
    torch.testing.assert_close(flow[0], whole(source, decoder_input_ids=target), rtol=0, atol=0)
    copies_of = cut.copies(names)
    assert [stage for stage, _ in copies_of["encoder_bias.weight"]] == [
        n for n, each in enumerate(layers) if each.start < 2
    ]
    assert {0, len(layers) - 1} <= {stage for stage, _ in copies_of["embedding.weight"]}
