"""A plan is complete, or it is an error; names and ties survive it."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from megalith.common.errors import ConfigError
from megalith.config.run import RunConfig
from megalith.parallel import plan, styles
from megalith.parallel.collectives import Axis
from megalith.parallel.plans import bert, t5
from megalith.parallel.plans.gpt import PLAN
from megalith.runtime.build import meta_model, plan_of
from megalith.testing import run_ranks
from tests.parity.cases import SMALL, config_of


def split(config: RunConfig, table: plan.Plan, sequence: bool = False):
    """The model on meta, split over all ranks."""
    model = meta_model(config.model)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan.apply(model, table, Axis(mesh, sequence))
    return model


def message(config: RunConfig, table: plan.Plan) -> str:
    """The error of a plan that does not fit, '' where it does."""
    try:
        split(config, table)
    except ConfigError as error:
        return str(error)
    return ""


def each_entry_left_out() -> dict[str, str]:
    return {
        entry: message(config_of("rotary"), {key: style for key, style in PLAN.items() if key != entry})
        for entry in PLAN
    }


def test_a_parameter_that_no_pattern_names_is_an_error() -> None:
    without_parameters = {
        "embedding_dropout",
        "attention.core",
        "shared_input",
        "attention_dropout",
        "mlp_dropout",
        "token_loss",
    }
    absent = {"position_embedding", "embedding_norm"}  # in the rotary form
    for entry, text in run_ranks(each_entry_left_out, 2)[0].items():
        if entry.endswith(tuple(without_parameters | absent)):
            assert text == ""
        else:
            name = entry.replace("*", "0") + ".weight"
            assert "no pattern names" in text and name in text, (entry, text)


def wrong_patterns() -> list[str]:
    wrong = ["layers.*.attention.qkv", "layers.*.mpl.up", "heads"]
    return [message(config_of("absolute"), {**PLAN, pattern: styles.column}) for pattern in wrong]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    first, second, third = run_ranks(wrong_patterns, 2)[0]
    assert "'layers.*.attention.qkv' matches nothing, as SelfAttention has no 'qkv'" in first
    assert "'layers.*.mpl.up' matches nothing, as Block has no 'mpl'" in second
    assert "'heads' matches nothing, as GPT has no 'heads'" in third


def heads_that_do_not_split() -> list[str]:
    config = config_of("absolute")
    other = config.replace(
        num_attention_heads=6, kv_channels=8, hidden_size=48, group_query_attention=True, num_query_groups=3
    )
    return [
        message(config.replace(hidden_size=30, num_attention_heads=3), PLAN),
        message(other, PLAN),
        message(config.replace(vocab_size=1), PLAN),
    ]


def test_heads_and_vocabularies_that_do_not_split_are_errors() -> None:
    queries, keys, vocabulary = run_ranks(heads_that_do_not_split, 2)[1]
    assert queries.startswith("The number of attention heads must be divisible") and "found 3" in queries
    assert "--tensor-model-parallel-size" in queries
    assert keys.startswith("The number of key/value heads must be divisible") and "found 3" in keys
    assert vocabulary.startswith("vocab_size must leave each of 2 tensor-parallel ranks a row; found 1")


def described(form: str) -> tuple[dict, bool]:
    model = split(config_of(form), PLAN, sequence=True)
    facts = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.is_meta and isinstance(parameter, torch.nn.Parameter)
        (placement,) = parameter.placements
        facts[name] = (
            tuple(parameter.shape),
            None if placement == Replicate() else placement.dim,
            tuple(parameter.to_local().shape),
        )
        assert placement in (Replicate(), Shard(0), Shard(1))
    return facts, model.head.weight is model.embedding.weight


@pytest.mark.parametrize("form", ["odd vocabulary", "alibi"])
def test_names_true_shapes_and_ties_are_kept(form: str) -> None:
    whole = {name: tuple(parameter.shape) for name, parameter in meta_model(config_of(form).model).named_parameters()}
    ranks = run_ranks(described, 4, form)
    for facts, tied in ranks:
        assert tied and {name: fact[0] for name, fact in facts.items()} == whole
    if form == "odd vocabulary":  # 67 = 17 + 17 + 17 + 16
        assert [facts["embedding.weight"] for facts, _ in ranks] == [
            ((67, 32), 0, (rows, 32)) for rows in (17, 17, 17, 16)
        ]
        assert ranks[0][0]["layers.1.attention.out.weight"] == ((32, 32), 1, (32, 8))
        assert ranks[0][0]["layers.1.attention.out.bias"] == ((32,), None, (32,))
    else:  # one key/value head, replicated
        assert ranks[3][0]["layers.0.attention.k.weight"] == ((8, 32), None, (8, 32))


def test_another_plan_can_be_named() -> None:
    for named, found in ((None, PLAN), ("bert", bert.PLAN), ("megalith.parallel.plans.t5:PLAN", t5.PLAN)):
        assert plan_of(SMALL.replace(tensor_parallel_plan=named)) is found
