"""The norm whose weight is stored minus one."""

import torch

from megalith.layers.norm import NORMS


def test_equals_the_plain_one_of_weight_plus_one() -> None:
    one, other = NORMS["rmsnorm_1p"](8, 1e-5).double(), NORMS["rmsnorm"](8, 1e-5).double()
    torch.nn.init.normal_(one.weight)
    other.weight.data = one.weight.detach() + 1
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(one(x), other(x))


def test_bfloat16_does_not_lose_small_weights() -> None:
    norm = NORMS["rmsnorm_1p"](64, 1e-5).bfloat16()
    torch.nn.init.constant_(norm.weight, 1e-3)  # 1 + 1e-3 is 1 in bfloat16
    x = torch.randn(500, 64).bfloat16()
    plain = torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-5).bfloat16()
    assert norm(x).dtype == torch.bfloat16 and not torch.equal(norm(x), plain)
