"""The script's optimizer on the placed model: its groups, its steps, what cannot work."""

import collections
from typing import Any

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer

from megalith.common.errors import ConfigError, TrainingError
from megalith.integrations.accelerate.optimizer import ELEMENTWISE, MegatronOptimizer, adopt
from megalith.optim.loss_scale import DynamicLossScale
from megalith.runtime.build import Runtime
from megalith.runtime.load import weights_of
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import accelerating, toy_model
from tests.integrations.accelerate.saving.training import (
    LAYOUTS,
    assert_equal,
    backward,
    no_decay_groups,
    placed,
    prepared,
    session_of,
    trained,
    trained_by_transformers,
)

FIVE = range(5)
# An epsilon that rounding of tiny gradients is small against.
ADAM = {"lr": 1e-3, "eps": 1e-5}


@pytest.fixture(autouse=True)
def state():
    with accelerating():
        yield


def names_in(runtime: Runtime, group: dict[str, Any]) -> list[str]:
    names = {id(parameter): name for name, parameter in runtime.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize(
    ("kind", "head"),
    [("gpt2", None), ("llama", None), ("bert", None), ("megatron-bert", "masked"), ("t5", None),
     ("megatron-bert", "classification")],
)  # fmt: skip
def test_groups_hold_what_they_held(kind: str, head: str | None) -> None:
    model = toy_model(kind, head)
    runtime = placed(model)
    optimizer = AdamW(no_decay_groups(model), **ADAM)
    groups = list(optimizer.param_groups)
    lines = adopt(optimizer, model, runtime)
    assert all(now is before for now, before in zip(optimizer.param_groups, groups, strict=True))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, others = (names_in(runtime, group) for group in groups)
    assert sorted(decayed + others) == sorted(name for name, _ in runtime.named_parameters())
    assert set(others) == {
        name
        for name, each in runtime.named_parameters()
        if (name.endswith("bias") and each.dim() == 1) or "norm" in name
    }
    added = "token_type_embeddings.weight (to position_embedding.weight)"
    assert bool(lines) == (head == "masked") and all(added in line for line in lines)


def test_names_are_those_of_the_placed_model() -> None:
    model = toy_model("gpt2")
    optimizer = Adam(list(model.named_parameters()))
    runtime = placed(model)
    adopt(optimizer, model, runtime)
    (group,) = optimizer.param_groups
    assert group["param_names"] == names_in(runtime, group) and "layers.0.attention.k.bias" in group["param_names"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_five_steps_are_those_of_transformers(kind: str) -> None:
    model, other = toy_model(kind), toy_model(kind)
    optimizer = prepared(model, AdamW(no_decay_groups(model), **ADAM), kind)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    found = trained(optimizer, kind, FIVE)
    expected = trained_by_transformers(other, AdamW(no_decay_groups(other), **ADAM), kind, FIVE)
    assert optimizer.session.steps == 5
    assert_equal(found, expected)
    assert (found["embedding.weight"] - full_weights(toy_model(kind))).abs().max() > 1e-3


def full_weights(model: nn.Module) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()


def test_a_model_without_weights_keeps_its_groups() -> None:
    with init_empty_weights():
        model = toy_model("gpt2")
    assert all(parameter.is_meta for parameter in model.parameters())
    optimizer = AdamW(no_decay_groups(model), **ADAM)
    runtime = placed(model, keep_weights=False)
    assert adopt(optimizer, model, runtime) == []
    assert [len(group["params"]) for group in optimizer.param_groups] == [26, 42]
    with init_empty_weights():
        model = toy_model("gpt2")
        optimizer = Adagrad(model.parameters())
    with pytest.raises(ConfigError, match=r"state sum of transformer.wte.weight must have .*; found shape .* on meta"):
        adopt(optimizer, model, runtime)


def test_parameters_of_no_group_are_frozen() -> None:
    model = toy_model("gpt2")
    model.transformer.h[0].mlp.requires_grad_(False)
    optimizer = AdamW([*model.transformer.h.parameters()], **ADAM)
    start = {name: each.detach().clone() for name, each in placed(model).named_parameters()}
    runtime = placed(model)
    (line,) = adopt(optimizer, model, runtime)
    frozen = "transformer.wte.weight, transformer.wpe.weight, transformer.ln_f.weight, transformer.ln_f.bias"
    assert line == f"Frozen, as no group of the optimizer has them: {frozen}"
    wrapped = prepared(model_again := toy_model("gpt2"), AdamW([*model_again.transformer.h.parameters()], **ADAM))
    found = trained(wrapped, "gpt2", FIVE)
    other = toy_model("gpt2")
    expected = trained_by_transformers(other, AdamW([*other.transformer.h.parameters()], **ADAM), "gpt2", FIVE)
    assert_equal(found, expected)
    assert found["embedding.weight"].equal(start["embedding.weight"])
    assert {name for name, each in runtime.named_parameters() if not each.requires_grad} == {
        "embedding.weight", "position_embedding.weight", "final_norm.weight", "final_norm.bias",
        "layers.0.mlp.up.weight", "layers.0.mlp.up.bias", "layers.0.mlp.down.weight", "layers.0.mlp.down.bias",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [Adagrad, AdamW])
def test_state_is_translated(kind: type[Optimizer]) -> None:
    """AdamW's of two steps before; Adagrad has some from the start."""
    model, other = toy_model("gpt2"), toy_model("gpt2")
    optimizer = kind(no_decay_groups(model), lr=1e-3, eps=1e-5)
    trained_by_transformers(model, optimizer, "gpt2", range(2) if kind is AdamW else range(0))
    found = trained(prepared(model, optimizer), "gpt2", range(2, 5) if kind is AdamW else FIVE)
    expected = trained_by_transformers(other, kind(no_decay_groups(other), lr=1e-3, eps=1e-5), "gpt2", FIVE)
    assert_equal(found, expected)


def test_conditions_of_the_plugin() -> None:
    """They act as further groups would, and schedulers still see the script's groups."""
    model, other = toy_model("gpt2"), toy_model("gpt2")
    seen = []

    def no_decay(name: str, parameter: torch.Tensor) -> bool:
        seen.append(name)
        return parameter.dim() == 1

    conditions = {"no_wd_decay_cond": no_decay, "scale_lr_cond": lambda name, _: ".h.1." in name, "lr_mult": 0.5}
    optimizer = prepared(model, SGD(model.parameters(), lr=0.1, weight_decay=0.2), **conditions)
    assert len(optimizer.param_groups) == 1 and "transformer.h.0.attn.c_attn.weight" in seen
    groups = collections.defaultdict(list)
    for name, parameter in other.named_parameters():
        groups[0.05 if ".h.1." in name else 0.1, 0.0 if parameter.dim() == 1 else 0.2].append(parameter)
    theirs = [{"params": each, "lr": lr, "weight_decay": decay} for (lr, decay), each in groups.items()]
    assert_equal(trained(optimizer, "gpt2", FIVE), trained_by_transformers(other, SGD(theirs), "gpt2", FIVE))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.2)]


def test_changed_architectures() -> None:
    """Parameters that transformers' model lacks join a group; those that ours lacks are told of."""
    model = toy_model("gpt2")
    runtime = placed(model, keep_weights=False, num_layers=5, untie_embeddings_and_output_weights=True,
                     position_embedding_type="rope")  # fmt: skip
    optimizer = AdamW(no_decay_groups(model))
    new, lacking = adopt(optimizer, model, runtime)
    assert new.startswith("Parameters that the transformers model lacks join the group of those like them: layers.4.")
    assert lacking == "Not trained, as the model here has no such parameters: transformer.wpe.weight"
    decayed, others = (names_in(runtime, group) for group in optimizer.param_groups)
    assert {"head.weight", "layers.4.attention.q.weight"} <= {*decayed} and "layers.4.mlp.up.bias" in others
    assert len(decayed) + len(others) == len(list(runtime.named_parameters()))


class Adam8bit(Optimizer):
    __module__ = "bitsandbytes.optim.adam"

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})


def foreign(model: nn.Module) -> Optimizer:
    return AdamW([*model.parameters(), nn.Parameter(torch.zeros(3, 5))])


def both_embeddings(model: nn.Module) -> Optimizer:
    named = list(model.named_parameters())
    parts = [[each for name, each in named if ("token_type" in name) == second] for second in (False, True)]
    return AdamW([{"params": part} for part in parts])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, r"Group 0 of the optimizer must hold parameters of the model.*found 1 others, of shapes \(3, 5\)"),
        (both_embeddings, "Groups 0 and 1 .* one parameter here; found position_embedding.weight. Put all parts"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "without a closure; found torch.optim.lbfgs.LBFGS"),
        (lambda model: Adam8bit(model.parameters()), "unquantized tensors .* found bitsandbytes.optim.adam.Adam8bit"),
    ],
)
def test_optimizers_that_cannot_work(make: Any, message: str) -> None:
    model = toy_model("megatron-bert", "masked")
    with pytest.raises(ConfigError, match=message):
        adopt(make(model), model, placed(model))


def test_optimizers_of_whole_matrices_on_one_process() -> None:
    model = toy_model("llama")
    optimizer = Adafactor(model.parameters())
    runtime = placed(model)
    assert adopt(optimizer, model, runtime) == []
    model = toy_model("gpt2")
    (line,) = adopt(Adafactor(model.parameters()), model, placed(model))
    assert line.startswith("Adafactor sees other matrices here") and "transformer.h.0.attn.c_attn.weight" in line


def test_when_the_optimizer_steps() -> None:
    model = toy_model("gpt2")
    optimizer = prepared(model, AdamW(no_decay_groups(model), **ADAM))
    session = optimizer.session
    start = {name: each.detach().clone() for name, each in session.runtime.named_parameters()}

    def unchanged() -> bool:
        return all(each.detach().equal(start[name]) for name, each in session.runtime.named_parameters())

    optimizer.step()  # no backward pass before it
    assert unchanged() and session.steps == 0 and not optimizer.step_was_skipped
    with pytest.raises(TrainingError, match="without a closure"):
        optimizer.step(lambda: None)
    session.gradient_state._set_sync_gradients(False)
    backward(session, "gpt2", 0)
    optimizer.step()
    optimizer.zero_grad()
    assert unchanged() and all(each.grad is not None for each in session.parameters)
    session.gradient_state._set_sync_gradients(True)
    optimizer.step()
    assert not unchanged() and session.steps == 1
    optimizer.zero_grad()
    assert all(each.grad is None for each in session.parameters) and not session.has_gradients


def test_steps_that_are_not_finite_are_skipped() -> None:
    model = toy_model("gpt2")
    optimizer = prepared(model, AdamW(model.parameters(), **ADAM))
    session = optimizer.session
    session.loss_scale = DynamicLossScale(initial=4.0, minimum=2.0, hysteresis=1)
    start = session.parameters[0].detach().clone()
    for expected in (2.0, 2.0):
        backward(session, "gpt2", 0)
        session.parameters[3].grad[0] = torch.inf
        if expected == session.loss_scale.scale:
            with pytest.warns(UserWarning, match="Gradients of optimizer step 0 are infinite or not a number"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped and session.steps == 0 and session.loss_scale.scale == expected
    assert session.parameters[0].equal(start)
    backward(session, "gpt2", 0)
    optimizer.step()
    assert not optimizer.step_was_skipped and session.steps == 1


def test_gradients_are_clipped_once() -> None:
    """By the plugin, unless the script has done so."""
    model, other = toy_model("gpt2"), toy_model("gpt2")
    optimizer = prepared(model, SGD(model.parameters(), lr=0.1), gradient_clipping=0.1)
    found = trained(optimizer, "gpt2", range(1))
    expected = trained_by_transformers(other, SGD(other.parameters(), lr=0.1), "gpt2", range(1), max_norm=0.1)
    assert_equal(found, expected)
    backward(optimizer.session, "gpt2", 1)
    optimizer.session.clip(0.05)
    optimizer.step()
    optimizer.zero_grad()
    expected = trained_by_transformers(other, SGD(other.parameters(), lr=0.1), "gpt2", range(1, 2), max_norm=0.05)
    assert_equal({name: each.detach() for name, each in optimizer.session.runtime.named_parameters()}, expected)


def test_state_dict_is_that_of_the_optimizer() -> None:
    model = toy_model("gpt2")
    optimizer = prepared(model, AdamW(no_decay_groups(model), **ADAM))
    trained(optimizer, "gpt2", range(1))
    state = optimizer.state_dict()
    assert state["param_groups"][0]["weight_decay"] == 0.1 and len(state["state"]) == len(optimizer.session.parameters)
    again = prepared(other := toy_model("gpt2"), AdamW(no_decay_groups(other), **ADAM))
    again.load_state_dict(state)
    assert float(again.state[again.param_groups[0]["params"][0]]["step"]) == 1.0


def in_layout(kind: str, layout: str, classes: list[type[Optimizer]]) -> None:
    """Steps of each optimizer on this rank are those of transformers alone."""
    for each in classes:
        with accelerating():
            model, other = toy_model(kind), toy_model(kind)
            options = {"eps": 1e-5} if "eps" in each(model.parameters()).defaults else {}
            options |= {"momentum": 0.9} if each is SGD else {}
            rate = 1e-3 if each is not SGD else 0.05
            decayed = "weight_decay" in each(model.parameters()).defaults
            groups = no_decay_groups if decayed else lambda model: [{"params": list(model.parameters())}]
            optimizer = prepared(model, each(groups(model), lr=rate, **options), kind, layout)
            assert len(optimizer.param_groups) == len(groups(model))
            found = trained(optimizer, kind, FIVE)
            expected = trained_by_transformers(other, each(groups(other), lr=rate, **options), kind, FIVE)
            assert_equal(found, expected, 3e-6)


def refused_in_layout() -> None:
    with accelerating():
        model = toy_model("llama")
        runtime = placed(model, **LAYOUTS["tp2"][1])
        with pytest.raises(
            ConfigError, match=r"Adafactor. Use torch.optim.AdamW, or tp_degree=1, .*`elementwise = True"
        ):
            adopt(Adafactor(model.parameters()), model, runtime)


def frozen_in_layout(layout: str) -> None:
    """The first half of the layers is frozen, which in a pipeline is a whole stage, and with tied weights the end."""
    with accelerating():
        model, other = toy_model("gpt2"), toy_model("gpt2")
        for each in (model, other):
            each.transformer.wte.requires_grad_(False)
            each.transformer.wpe.requires_grad_(False)
            each.transformer.h[:2].requires_grad_(False)
        trains = [[each for each in one.parameters() if each.requires_grad] for one in (model, other)]
        optimizer = prepared(model, AdamW(trains[0], **ADAM), layout=layout)
        found = trained(optimizer, "gpt2", FIVE)
        assert_equal(found, trained_by_transformers(other, AdamW(trains[1], **ADAM), "gpt2", FIVE), 3e-6)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_steps_in_layouts(layout: str) -> None:
    run_ranks(in_layout, LAYOUTS[layout][0], "gpt2", layout, [AdamW])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_every_optimizer_in_every_layout(kind: str, layout: str) -> None:
    classes = [AdamW, *ELEMENTWISE] if kind == "gpt2" else [AdamW]
    run_ranks(in_layout, LAYOUTS[layout][0], kind, layout, classes, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "zbv", "dp2", "dp2 sharded", "tp2 pp2"])
def test_frozen_parameters_in_layouts(layout: str) -> None:
    run_ranks(frozen_in_layout, LAYOUTS[layout][0], layout)


def in_16_bits() -> None:
    """Groups with frozen parameters, sharded."""
    with accelerating():
        model = toy_model("gpt2")
        model.transformer.h[:2].requires_grad_(False)
        session = session_of(placed(model, bf16=True, use_distributed_optimizer=True))
        optimizer = AdamW(no_decay_groups(model), **ADAM)
        adopt(optimizer, model, session.runtime)
        with pytest.raises(ConfigError, match=r"are DTensors for mixed precision; found torch.optim"):
            adopt(Adafactor(model.parameters()), model, session.runtime)
        Accelerator(cpu=True)
        found = trained(MegatronOptimizer(optimizer, session), "gpt2", FIVE)
        start = weights_of(toy_model("gpt2")).tensors
        for name, tensor in found.items():
            frozen = name.startswith(("layers.0.", "layers.1."))
            assert tensor.equal(start[f"model/{name}"].read()) == frozen, name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_frozen_parameters_in_16_bits(processes: int) -> None:
    run_ranks(in_16_bits, processes)


@pytest.mark.slow
def test_optimizers_of_whole_matrices_are_refused_where_these_are_divided() -> None:
    run_ranks(refused_in_layout, 2)


def test_it_is_an_optimizer_of_accelerate() -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    model = toy_model("gpt2")
    optimizer = prepared(model, SGD(model.parameters(), lr=0.1))
    assert isinstance(optimizer, AcceleratedOptimizer) and isinstance(optimizer, MegatronOptimizer)
