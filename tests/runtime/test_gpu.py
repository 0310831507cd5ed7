"""What only an accelerator can show: the same numbers as the CPU, in every path that differs there."""

import pytest
import torch

from tests.tiny import losses, tiny_config

pytestmark = pytest.mark.gpu
FORMS = {
    "absolute": {},
    "rotary": {"position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm", "num_query_groups": 2},
    "alibi": {"position_embedding_type": "alibi"},
}


@pytest.fixture
def device() -> torch.device:
    return torch.accelerator.current_accelerator()


@pytest.mark.parametrize("form", FORMS)
def test_initial_weights_losses_and_gradients(form, device):
    """Hidden dropout on: its masks are a hash, the same everywhere."""
    from megalith.runtime.build import build_model

    config = tiny_config("unused", "unused", attention_dropout=0.0, **FORMS[form]).replace(vocab_size=50)
    seen = []
    for target in (torch.device("cpu"), device):
        model = build_model(config.model, target, seed=1).train()
        ids = (torch.arange(4 * 17).view(4, 17) * 7 % 50).to(target)
        given = {"samples": torch.arange(4, device=target), "step": torch.tensor(3, device=target)}
        weights = torch.full((4, 16), 1 / 64, device=target)
        loss = model(ids[:, :-1], labels=ids[:, 1:].contiguous(), loss_weights=weights, **given).sum()
        start = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        loss.backward()
        seen.append((start, loss.item(), {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}))
    (starts, loss, gradients), (their_starts, their_loss, their_gradients) = seen
    assert their_loss == pytest.approx(loss, rel=1e-5)
    for name in starts:
        torch.testing.assert_close(their_starts[name], starts[name], rtol=1e-6, atol=1e-8, msg=name)
        torch.testing.assert_close(their_gradients[name], gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["documents", "slopes", "window", "groups", "padding"])
def test_flex_attention_equals_the_reference(kind, device):
    from megalith.layers.attention import CoreAttention
    from megalith.layers.mask import AttentionMask

    heads = 2 if kind == "groups" else 4
    given = {
        "documents": {"documents": torch.arange(256, device=device).div(50, rounding_mode="floor").expand(2, -1)},
        "slopes": {"slopes": torch.linspace(0.1, 0.5, 4, device=device)},
        "window": {"window": 33},
        "groups": {"window": 64},
        "padding": {"padding": torch.arange(256, device=device) >= torch.tensor([[0], [99]], device=device)},
    }[kind]
    found = []
    for backend in ("explicit", "flex"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, n, 256, 32, device=device, requires_grad=True) for n in (4, heads, heads))
        out = CoreAttention(0.0, "site", backend)(q, k, v, AttentionMask(**given))
        out.square().sum().backward()
        found.append((out.detach(), q.grad, k.grad, v.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"bf16": True, "compile": True}, {"fp16": True}],
    ids=["float32", "bf16", "compiled", "fp16"],
)
def test_a_run_trains_resumes_and_writes(changes, tmp_path, device):
    import megalith
    from megalith.training.pretrain import train
    from tests.tiny import write_corpus

    corpus = write_corpus(str(tmp_path / "corpus"))
    config = tiny_config(
        corpus, str(tmp_path / "run"), device=device.type, train_iters=40, deterministic_mode=True, **changes
    )
    train(config.replace(exit_interval=20))
    train(config)
    found = losses(str(tmp_path / "run"))
    assert len(found) == 40 and found[-1] < 0.9 * found[0]
    model = megalith.load(str(tmp_path / "run"), device=device.type)
    assert len(megalith.generate(model, ["1 2 3"], max_new_tokens=4, seed=1)) == 1
