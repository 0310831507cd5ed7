"""Adapters by themselves: which layers have them, how they start, what they are merged into, what is an error."""

import math
import re

import pytest
import torch

from megalith.checkpoint.formats.adapters import add_product, fingerprint, merge
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights
from megalith.config.adapters import A, B, adapted_modules, adapter_shapes
from megalith.config.checks.checks import find_problems
from megalith.config.run import RunConfig
from megalith.layers.dropout import Dropout
from megalith.parallel import lora, mesh
from megalith.parallel.matmul import Linear
from megalith.runtime.build import build_model, build_runtime
from megalith.testing import run_ranks
from megalith.testing.parity import full_tensor
from tests.parity.cases import SMALL, config_of

T5 = config_of("lora t5").replace(lora_rank=0)


def modules(config: RunConfig, *patterns: str) -> set[str]:
    """The layers that patterns name, of the first block that has them."""
    found = adapted_modules(config.model, config.replace(lora_rank=2, lora_target_modules=list(patterns)).lora)
    return {re.sub(r"layers\.\d+\.", "", name) for name in found}


def test_patterns_name_linear_layers_of_blocks() -> None:
    everything = {"attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.down"}
    assert modules(SMALL) == everything == modules(SMALL, "*")
    assert modules(SMALL, "q", "layers.1.mlp.*") == {"attention.q", "mlp.up", "mlp.down"}
    assert modules(T5, "q") == {"attention.q", "cross_attention.q"} and modules(T5, "attention.q") == {"attention.q"}
    shapes = adapter_shapes(SMALL.model, SMALL.replace(lora_rank=3, lora_target_modules=["layers.0.mlp.up"]).lora)
    assert shapes == {"layers.0.mlp.up.lora.a": (3, 32), "layers.0.mlp.up.lora.b": (48, 3)}


def initial_values(config: RunConfig) -> dict[str, torch.Tensor]:
    """The initial adapters of a layout."""
    runtime = build_runtime(config, mesh.init_mesh(config.parallel))
    return {name: full_tensor(each) for name, each in runtime.named_parameters() if each.requires_grad}


def test_adapters_start_as_those_of_peft_whatever_the_layout() -> None:
    """A as torch's linear layers, whose standard deviation is 1 / sqrt(3 inputs); B as zeros."""
    config = config_of("absolute").replace(lora_rank=16, hidden_size=64, num_attention_heads=4)
    (one,) = run_ranks(initial_values, 1, config)
    assert one.keys() == set(adapter_shapes(config.model, config.lora))
    for found in run_ranks(initial_values, 4, config.replace(tensor_model_parallel_size=4)):
        for name, value in found.items():
            assert torch.equal(value, one[name]), name
            if name.endswith(A):
                assert float(value.std()) == pytest.approx(1 / math.sqrt(3 * value.shape[1]), rel=0.05)
                assert float(value.abs().max()) <= 1 / math.sqrt(value.shape[1])
            else:
                assert name.endswith(B) and not value.any()


def test_an_adapter_with_dropout_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = Linear(torch.nn.Linear(6, 5))
    layer.lora = lora.Adapter(layer, SMALL.replace(lora_rank=2, lora_alpha=3.0).lora, Dropout(0.5, "s"), torch.float32)
    layer.lora.to_empty(device="cpu")
    for parameter in layer.lora.parameters():
        torch.nn.init.normal_(parameter)
    x, layer.lora.dropout_keys = torch.randn(2, 3, 6), torch.arange(6, dtype=torch.int32).view(2, 3)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for training in (True, False):
        layer.train(training)
        dropped = Dropout(0.5, "s").train(training)(x, layer.lora.dropout_keys)
        assert bool((dropped == 0).any()) == training
        torch.testing.assert_close(layer(x), plain + 1.5 * dropped @ layer.lora.a.t() @ layer.lora.b.t())


def test_merging_reads_boxes_and_leaves_a_plain_model() -> None:
    config = SMALL.replace(lora_rank=2, lora_alpha=3.0, lora_target_modules=["mlp.up"])
    model = build_model(config.model, torch.device("cpu"), seed=1, lora=config.lora)
    torch.nn.init.normal_(model.layers["1"].mlp.up.lora.b)
    tensors = {f"model/{name}": each.detach() for name, each in model.named_parameters()}
    weights = Weights(config=config, tensors={name: Lazy.of(each) for name, each in tensors.items()})
    merged, name = merge(weights), "layers.1.mlp.up"
    assert merged.config == config.replace(lora_rank=0, lora_alpha=None, lora_target_modules=[]) and merged.keys() == {
        each for each in tensors if not each.endswith((A, B))
    }
    a, b = tensors[f"model/{name}{A}"], tensors[f"model/{name}{B}"]
    expected = tensors[f"model/{name}.weight"] + 1.5 * b @ a
    torch.testing.assert_close(merged[f"model/{name}.weight"], expected)
    box = (slice(3, 7), slice(8, 20))
    torch.testing.assert_close(merged.tensors[f"model/{name}.weight"].part(box), expected[box])
    assert fingerprint(weights) == fingerprint(weights) != fingerprint(merged)
    narrow = add_product(Lazy.of(expected.bfloat16()), Lazy.of(b), Lazy.of(a), 1.0, widen=False)
    assert narrow.read().dtype == narrow.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "--lora-dropout is for LoRA, which --lora-rank asks for; found 0.1. Add --lora-rank 8"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "--lora-alpha must be above 0, or the adapters have no effect; found 0."),
        (
            {"lora_rank": 2, "lora_target_modules": ["q_proj"]},
            "--lora-target-modules must name linear layers of the transformer blocks (attention.q, attention.k, "
            "attention.v, attention.out, mlp.up, mlp.down); found 'q_proj'. Write ",
        ),
        (
            {"lora_rank": 2, "lora_target_modules": ["layers.1.*"], "pipeline_model_parallel_size": 2},
            "--lora-target-modules must give every pipeline stage an adapter, as each trains what it has; "
            "found none in layers 0 to 0.",
        ),
        ({"lora_rank": 2, "lora_dropout": 1.0}, "--lora-dropout must be a fraction below 1; found 1.0."),
    ],
)
def test_what_cannot_work_is_said(changes: dict, message: str) -> None:
    config = SMALL.replace(**changes)
    found = find_problems(config, config.parallel.model_parallel_size, data=False, one_step=True)
    assert [each.text[: len(message)] for each in found if each.text.startswith("--lora")] == [message]


def test_dropout_of_keys_of_cross_attention_is_refused() -> None:
    config = T5.replace(lora_rank=2, lora_dropout=0.1)
    (problem,) = find_problems(config, 1, data=False, one_step=True)
    assert "--lora-dropout must be 0 where keys and values of cross attention have adapters" in problem.text
    cure = problem.text.partition("--lora-target-modules ")[2].rstrip(".").split()
    assert not find_problems(config.replace(lora_target_modules=cure), 1, data=False, one_step=True)
