"""One norm for every layout: against the norm of the whole tensors, held by one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from megalith.optim.clip import clip, count_zeros, global_norm, gradients

# Placements over a mesh of 2 (dp) x 2 (tp); rows and columns that do not divide evenly are among them.
LAYOUTS = {
    "both axes shard rows": ((6, 5), (Shard(0), Shard(0))),
    "strided, as fully_shard over tensor parallel": ((8, 5), (_StridedShard(0, split_factor=2), Shard(0))),
    "rows and columns": ((5, 7), (Shard(0), Shard(1))),
    "dp only": ((7, 3), (Shard(0), Replicate())),
    "tp only": ((4, 4), (Replicate(), Shard(1))),
    "nowhere": ((3, 4), (Replicate(), Replicate())),
    "fewer rows than ranks": ((1, 4), (Shard(0), Shard(0))),
}


def whole(stage=0):
    """The same tensors on every rank, some elements zero."""
    generator = torch.Generator().manual_seed(1 + stage)
    tensors = {name: torch.randn(shape, generator=generator) for name, (shape, _) in LAYOUTS.items()}
    for tensor in tensors.values():
        tensor[0, 0] = 0.0
    return tensors


def norm_of(*tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def placed(mesh, stage=0):
    return [(name, distribute_tensor(tensor, mesh, LAYOUTS[name][1])) for name, tensor in whole(stage).items()]


def counted(function, *args, **kwargs):
    """The result and how many all-reduces it took."""
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    try:
        return function(*args, **kwargs), len(calls)
    finally:
        dist.all_reduce = original


def on_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    grads = placed(mesh)
    plain = ("plain", torch.full((3,), 2.0))
    results = {name: counted(global_norm, [(name, grad)])[0].item() for name, grad in grads}
    together, calls = counted(global_norm, [*grads, plain])
    zeros = count_zeros(grads).item()
    before = clip([*grads, plain], 0.5)
    after = global_norm([*grads, plain])
    again = global_norm([*grads, plain])
    return results, together.item(), calls, zeros, before.item(), after.item(), again.item(), grads[0][1].full_tensor()


def test_dtensors_of_any_placement(ranks):
    expected = whole()
    total = norm_of(*expected.values(), torch.full((3,), 2.0))
    answers = ranks(on_a_mesh, 4)
    assert len({together for _, together, *_ in answers}) == 1  # the same bits on every rank
    for results, together, calls, zeros, before, after, again, first in answers:
        for name, tensor in expected.items():
            assert results[name] == pytest.approx(norm_of(tensor), rel=1e-6), name
        assert together == pytest.approx(total, rel=1e-6)
        assert calls == 1
        assert zeros == len(expected)
        assert before == together
        assert after == pytest.approx(0.5, rel=1e-5)
        assert again == after
        name = next(iter(expected))
        torch.testing.assert_close(first, expected[name] * (0.5 / (total + 1e-6)))


def on_stages():
    """Two stages of two ranks, each stage with tensors of its own and a second copy of a tensor that stage 0 owns."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = world["pp"].get_local_rank()
    grads = [
        ("layer", distribute_tensor(whole(stage)["dp only"], world["dp"], [Shard(0)])),
        ("norm", torch.full((3,), 1.0 + stage)),
        ("embedding", distribute_tensor(whole()["nowhere"], world["dp"], [Replicate()])),
    ]
    not_owned = {2} if stage == 1 else set()
    norm, calls = counted(clip, grads, 0.25, not_owned=not_owned, stages=2)
    return norm.item(), calls, global_norm(grads, not_owned=not_owned, stages=2).item(), grads[2][1].full_tensor()


def test_pipeline_stages_and_a_shared_embedding(ranks):
    parts = whole(0)["dp only"], whole(1)["dp only"], torch.full((3,), 1.0), torch.full((3,), 2.0), whole()["nowhere"]
    for norm, calls, after, embedding in ranks(on_stages, 4):
        assert norm == pytest.approx(norm_of(*parts), rel=1e-6)
        assert calls == 1
        assert after == pytest.approx(0.25, rel=1e-5)
        # The second copy is clipped too
        torch.testing.assert_close(embedding, whole()["nowhere"] * (0.25 / (norm + 1e-6)))


def on_a_part_of_the_world():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "dp"))
    grads = [("w", distribute_tensor(whole(dist.get_rank() // 2)["dp only"], mesh["dp"], [Shard(0)]))]
    return global_norm(grads, group=mesh["dp"].get_group()).item()


def test_two_models_side_by_side_in_one_world(ranks):
    norms = ranks(on_a_part_of_the_world, 4)
    for stage in (0, 1):
        assert norms[2 * stage] == norms[2 * stage + 1] == pytest.approx(norm_of(whole(stage)["dp only"]), rel=1e-6)


def one_rank_overflows():
    mesh = init_device_mesh("cpu", (2,))
    grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    if dist.get_rank() == 1:
        grad.to_local()[0] = float("inf")
    return clip([("w", grad)], 1.0).item()


def test_an_overflow_anywhere_shows_everywhere(ranks):
    assert all(not math.isfinite(norm) for norm in ranks(one_rank_overflows, 2))


def unreduced():
    mesh = init_device_mesh("cpu", (2,))
    grad = torch.distributed.tensor.DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(AssertionError, match="reduced") as caught:
        global_norm([("w", grad)])
    return str(caught.value)


def test_an_unreduced_gradient_is_our_own_bug(ranks):
    assert all("reduced" in message for message in ranks(unreduced, 2))


def test_the_factor_is_megatrons():
    grads = [("w", torch.tensor([3.0, 4.0]))]
    assert clip(grads, 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(grads[0][1], torch.tensor([3.0, 4.0]) / (5.0 + 1e-6), rtol=1e-7, atol=0)


@pytest.mark.parametrize("max_norm", [10.0, 0.0])
def test_small_gradients_and_clip_zero_change_no_bit(max_norm):
    grads = [("w", torch.tensor([3.0, 4.1]))]
    clip(grads, max_norm)
    assert torch.equal(grads[0][1], torch.tensor([3.0, 4.1]))


@pytest.mark.parametrize("max_norm, expected", [(0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_the_loss_scale_comes_out_in_the_same_pass(max_norm, expected):
    grads = [("w", torch.tensor([3.0, 4.0]) * 1024)]
    assert clip(grads, max_norm, inverse_scale=1 / 1024).item() == pytest.approx(5.0)
    torch.testing.assert_close(grads[0][1], torch.tensor(expected))


def test_half_precision_gradients_are_summed_in_float32():
    assert global_norm([("w", torch.full((100_000,), 0.01, dtype=torch.bfloat16))]).item() == pytest.approx(
        math.sqrt(1e5) * torch.tensor(0.01, dtype=torch.bfloat16).item(), rel=1e-6
    )


def test_float64_gradients_keep_their_digits():
    value = torch.randn(1000, dtype=torch.float64)
    assert global_norm([("w", value)]).item() == pytest.approx(norm_of(value), rel=1e-14)


def test_a_large_tensor_is_as_exact_as_its_shards():
    value = torch.randn(8_000_000, generator=torch.Generator().manual_seed(0))
    assert global_norm([("w", value)]).item() == pytest.approx(norm_of(value), rel=2e-7)


def test_tensors_that_are_not_contiguous():
    value = torch.randn(40, 30)
    assert global_norm([("w", value.t()[::2])]).item() == pytest.approx(norm_of(value[:, ::2]), rel=1e-6)


def test_nothing_to_clip():
    assert clip([], 1.0).item() == 0.0
    assert count_zeros([]).item() == 0.0


def test_zeros_and_gradients_of_a_model():
    model = torch.nn.Linear(2, 3)
    model.weight.grad = torch.tensor([[0.0, 1.0], [0.0, -0.0], [2.0, 3.0]])
    named = gradients(model.named_parameters())
    assert [name for name, _ in named] == ["weight"]  # the bias has none
    assert count_zeros(named).item() == 3


def test_the_norm_of_parameters():
    model = torch.nn.Linear(2, 3)
    norm = global_norm(list(model.named_parameters()))
    assert norm.item() == pytest.approx(norm_of(*model.parameters()), rel=1e-6) and not norm.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerator_counts_as_the_cpu_does(dtype):
    device = torch.accelerator.current_accelerator()
    tensors = [
        torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (1, 1000, 5_000_000)
    ]
    tensors[1][:10] = 0.0
    grads = [(str(number), tensor.to(device)) for number, tensor in enumerate(tensors)]
    assert count_zeros(grads).item() == 10
    assert clip(grads, 1.0).item() == pytest.approx(norm_of(*tensors), rel=1e-6)
    assert global_norm(grads).item() == pytest.approx(1.0, rel=1e-6 if dtype == torch.float32 else 1e-2)
