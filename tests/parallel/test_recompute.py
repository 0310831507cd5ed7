"""Recomputed activations: the same bits, and less kept for the backward pass."""

import pytest
import torch

from megalith.config.run import RunConfig
from megalith.config.sections.recompute import RecomputeConfig
from megalith.parallel import recompute
from megalith.runtime.build import build_model

CONFIG = RunConfig().replace(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    max_position_embeddings=64,
    vocab_size=40,
    attention_backend="explicit",
)
KINDS = {
    "selective": RecomputeConfig(recompute_activations=True),
    "uniform": RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    "block": RecomputeConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=3),
    "uneven": RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=3),
}


def measure(config: RecomputeConfig) -> tuple[dict[str, torch.Tensor], int, list[tuple]]:
    """Gradients by name, elements kept between the passes, and the shapes of what is kept."""
    model = build_model(CONFIG.model, torch.device("cpu"), seed=3).train()
    names = [name for name, _ in model.named_parameters()]
    recompute.apply(model, config)
    assert [name for name, _ in model.named_parameters()] == names, "checkpoints have canonical names"
    ids = torch.arange(2 * 65).view(2, 65) % 40
    weights, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(
            ids[:, :-1],
            labels=ids[:, 1:],
            loss_weights=torch.full((2, 64), 1 / 128),
            samples=torch.arange(2),
            step=torch.tensor(5),
        ).sum()
    shapes = [tuple(tensor.shape) for tensor in kept.values()]
    size = sum(tensor.numel() for tensor in kept.values())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, size, shapes


@pytest.fixture(scope="module")
def everything_kept():
    return measure(RecomputeConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_and_less_kept(kind, everything_kept):
    """Dropout is on, in the residual branches and in attention."""
    expected, whole, _ = everything_kept
    found, size, _ = measure(KINDS[kind])
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    assert size < 0.75 * whole


def test_selective_keeps_nothing_of_sequence_by_sequence(everything_kept):
    assert any(shape[-2:] == (64, 64) for shape in everything_kept[2])
    assert not any(shape[-2:] == (64, 64) for shape in measure(KINDS["selective"])[2])
