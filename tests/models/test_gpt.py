"""GPT in all its forms: size by formula, documents kept apart, positions, ties, losses, dropout."""

from typing import Any

import pytest
import torch

from megalith.config.sections.model import ModelConfig
from megalith.models.gpt import GPT
from megalith.runtime.initialize import initialize

BASE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 29,
    "max_position_embeddings": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.3,
}
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {"openai_gelu": True},
    "rope": {"position_embedding_type": "rope"},
    "rotary, a quarter, interleaved": {
        "position_embedding_type": "rotary",
        "rotary_percent": 0.34,
        "rotary_interleaved": True,
    },
    "alibi": {"position_embedding_type": "alibi"},
    "no positions": {"position_embedding_type": "none"},
    "multiquery": {"attention_head_type": "multiquery"},
    "llama": {
        "use_rotary_position_embeddings": True,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "num_query_groups": 2,
        "ffn_hidden_size": 40,
    },
    "qwen2": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    },
    "qwen3": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "qk_layernorm": True,
        "kv_channels": 10,
    },
    "geglu": {"glu_activation": "geglu"},
    "squared relu": {"squared_relu": True},
    "post norm residual": {"apply_residual_connection_post_layernorm": True},
    "wide heads": {"kv_channels": 8, "ffn_hidden_size": 17},
    "explicit": {"attention_backend": "unfused"},
}


def model(form: str = "gpt2", **more: Any) -> GPT:
    """A model of this form with weights from the counter, in float64."""
    gpt = GPT(ModelConfig(**{**BASE, **FORMS[form], **more}), seed=1)
    initialize(gpt, 1)
    return gpt.double()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(BASE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def expected_parameters(c: ModelConfig) -> int:
    """Counted from the published shapes."""
    h, d, inner = c.hidden_size, c.head_dim, c.ffn_size
    q, kv = c.num_attention_heads * d, c.num_kv_heads * d
    norm = (2 if c.norm == "layernorm" else 1) * h
    attention = 2 * h * q + 2 * h * kv + (h if c.add_bias_linear else 0)
    attention += (q + 2 * kv) * (c.add_bias_linear or c.add_qkv_bias) + 2 * d * c.qk_layernorm
    mlp = (3 if c.gated else 2) * h * inner + ((2 if c.gated else 1) * inner + h) * c.add_bias_linear
    total = (
        c.vocab_size * h * (2 if c.untie_embeddings_and_output_weights else 1)
        + c.num_layers * (attention + mlp + 2 * norm)
        + norm
    )
    return total + (c.max_position_embeddings * h if c.positions == "learned_absolute" else 0)


@pytest.mark.parametrize("form", FORMS)
def test_parameter_count(form: str) -> None:
    gpt = model(form)
    assert sum(p.numel() for p in gpt.parameters()) == expected_parameters(gpt.config)


def test_gpt2_small_has_its_published_size() -> None:
    config = ModelConfig(
        num_layers=12, hidden_size=768, num_attention_heads=12, vocab_size=50257, max_position_embeddings=1024
    )
    with torch.device("meta"):
        gpt = config.architecture.find("model")(config)
    assert sum(p.numel() for p in gpt.parameters()) == 124_439_808


def test_llama_7b_has_its_published_size() -> None:
    config = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        swiglu=True,
        ffn_hidden_size=11008,
        normalization="RMSNorm",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    with torch.device("meta"):
        gpt = GPT(config)
    assert sum(p.numel() for p in gpt.parameters()) == 6_738_415_616


@pytest.mark.parametrize("form", FORMS)
def test_is_causal(form: str) -> None:
    gpt, ids = model(form), tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % BASE["vocab_size"]
    before, after = gpt(ids), gpt(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert all((before[:, position] - after[:, position]).abs().max() > 1e-6 for position in (7, 11))


@pytest.mark.parametrize("form", FORMS)
def test_documents_equal_separate_runs(form: str) -> None:
    gpt, ids = model(form), tokens(batch=1)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    positions = torch.tensor([[*range(5), *range(4), *range(3)]])
    packed = gpt(ids, positions, documents)
    apart = torch.cat([gpt(part) for part in ids.split([5, 4, 3], dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-6)  # float32 angles: 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_not_seen(form: str) -> None:
    """Before the tokens, with positions that begin after it, and after them; what sees no token is a number too."""
    gpt, ids = model(form), tokens(batch=2)
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 9 + [0] * 3])
    positions = torch.stack((torch.arange(-4, 8).clamp(min=0), torch.arange(12)))
    padded = gpt(ids, positions, padding_mask=mask)
    torch.testing.assert_close(padded[:1, 4:], gpt(ids[:1, 4:]), rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[1:, :9], gpt(ids[1:, :9]), rtol=0, atol=1e-6)
    changed = gpt(torch.where(mask > 0, ids, 0), positions, padding_mask=mask)
    assert torch.equal(changed[mask > 0], padded[mask > 0])
    gpt(ids, positions, padding_mask=mask, labels=ids).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in gpt.parameters())


def test_padding_in_packed_documents() -> None:
    """Each document is seen by its own tokens alone, and its padding by none."""
    gpt, ids = model("rope"), tokens(batch=1)
    documents, mask = torch.tensor([[0] * 5 + [1] * 7]), torch.tensor([[1] * 3 + [0] * 2 + [0] * 2 + [1] * 5])
    found = gpt(ids, documents=documents, padding_mask=mask)
    torch.testing.assert_close(found[:, :3], gpt(ids[:, :3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 7:], gpt(ids[:, 7:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_cross_entropy_of_the_logits(form: str) -> None:
    gpt, ids, labels = model(form, loss_chunk_tokens=5), tokens(), tokens(seed=1)
    weights = torch.rand(2, 12)
    expected = torch.nn.functional.cross_entropy(gpt(ids).flatten(0, 1), labels.flatten(), reduction="none").view(2, 12)
    torch.testing.assert_close(gpt(ids, labels=labels), expected, rtol=1e-10, atol=1e-10)
    weighted = gpt(ids, labels=labels, loss_weights=weights)
    torch.testing.assert_close(weighted, expected * weights.double(), rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(weighted.sum(), list(gpt.parameters()))
    wanted = torch.autograd.grad((expected * weights.double()).sum(), list(gpt.parameters()))
    for (name, _), actual, correct in zip(gpt.named_parameters(), got, wanted):
        assert (actual - correct).norm() <= 1e-10 * max(1.0, correct.norm().item()), name


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_backends_agree(form: str) -> None:
    ids = tokens()
    torch.testing.assert_close(model(form)(ids), model(form, attention_backend="explicit")(ids), rtol=1e-10, atol=1e-10)


def test_positions_move_the_position_embedding() -> None:
    gpt, ids = model(), tokens()
    ahead = torch.arange(12) + 4
    expected = gpt(ids, ahead.expand(2, -1))
    with torch.no_grad():
        gpt.position_embedding.weight.copy_(gpt.position_embedding.weight.roll(-4, 0))
    torch.testing.assert_close(gpt(ids), expected)
    rope = model("rope")
    torch.testing.assert_close(rope(ids), rope(ids, ahead.expand(2, -1)), rtol=0, atol=1e-5)  # only distances matter


def test_no_positions_still_know_order_by_causality_alone() -> None:
    gpt, ids = model("no positions", num_layers=1), tokens(batch=1)
    swapped = ids.clone()
    swapped[0, 3], swapped[0, 6] = ids[0, 6], ids[0, 3]
    torch.testing.assert_close(gpt(ids)[:, 11], gpt(swapped)[:, 11], rtol=0, atol=1e-12)


def test_tied_and_untied_heads() -> None:
    tied, untied = model(), model(untie_embeddings_and_output_weights=True)
    assert tied.head.weight is tied.embedding.weight and "head.weight" not in dict(tied.named_parameters())
    assert untied.head.weight is not untied.embedding.weight and not torch.equal(
        untied.head.weight, untied.embedding.weight
    )
    tied(tokens(), labels=tokens(seed=1)).sum().backward()
    assert (tied.embedding.weight.grad.abs().sum(dim=1) > 0).all()  # the head's gradient reaches every row


def test_parts_of_a_model_run_one_after_the_other() -> None:
    """What a pipeline does: the same class with the parts it lacks set to None."""
    whole, ids = model("rope"), tokens()
    first, second = model("rope"), model("rope")
    first.head, first.final_norm = None, None
    second.embedding = None
    for number in ("1", "2"):
        del first.layers[number]
    del second.layers["0"]
    assert torch.equal(second(first(ids)), whole(ids))


def test_dropout_wants_samples_and_step() -> None:
    gpt = model(hidden_dropout=0.1, attention_dropout=0.1)
    with pytest.raises(ValueError, match="samples"):
        gpt(tokens())
    assert torch.equal(gpt.eval()(tokens()), model()(tokens()))


@pytest.mark.parametrize("form", ["gpt2", "alibi", "multiquery"])
def test_dropout_is_the_same_in_any_micro_batch(form: str) -> None:
    gpt, ids, labels = model(form, hidden_dropout=0.2, attention_dropout=0.2), tokens(4), tokens(4, seed=1)
    samples, step = torch.tensor([100, 101, 102, 103]), torch.tensor(5)
    whole = gpt(ids, labels=labels, samples=samples, step=step)
    for cut in (1, 2):
        parts = [
            gpt(ids[i : i + cut], labels=labels[i : i + cut], samples=samples[i : i + cut], step=step)
            for i in range(0, 4, cut)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(gpt(ids, labels=labels, samples=samples, step=step + 1), whole)
    assert not torch.allclose(GPT.forward(gpt, ids, labels=labels, samples=samples + 1, step=step), whole)


def test_initial_weights_follow_megatron() -> None:
    gpt = GPT(
        ModelConfig(**{**BASE, "hidden_size": 128, "num_layers": 8, "vocab_size": 1000, "init_method_std": 0.02}),
        seed=1,
    )
    initialize(gpt, 3)
    values = dict(gpt.named_parameters())
    assert values["layers.2.mlp.up.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert values["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("layers.7.mlp.down.weight", "layers.0.attention.out.weight"):
        assert values[name].std().item() == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 x 8 layers)
    assert all((v == 0).all() for name, v in values.items() if name.endswith("bias"))
    assert all((v == 1).all() for name, v in values.items() if "norm" in name and name.endswith("weight"))


def test_xavier_uniform() -> None:
    gpt = GPT(ModelConfig(**{**BASE, "init_method_xavier_uniform": True}))
    initialize(gpt, 3)
    weight = gpt.layers["0"].mlp.up.weight
    limit = (6 / (24 + 96)) ** 0.5
    assert 0.95 * limit < weight.abs().max() <= limit
    assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)


def test_no_recompile_from_step_to_step() -> None:
    """Steps and samples are tensors, so that a compiled model compiles once."""
    gpt, counts = model(hidden_dropout=0.1), []
    backend = lambda graph, inputs: counts.append(1) or graph.forward  # noqa: E731
    compiled = torch.compile(gpt, backend=backend)
    for step in range(4):
        compiled(
            tokens(seed=step), samples=torch.tensor([2 * step, 2 * step + 1]), step=torch.tensor(step)
        ).sum().backward()
    assert len(counts) == 1


@pytest.mark.parametrize("form", FORMS)
def test_layers_share_one_compilation(form: str) -> None:
    """As `--compile` does; a value that differs between layers must be no constant, or the ninth layer is refused."""
    torch._dynamo.reset()
    gpt, counts = model(**{**FORMS[form], "num_layers": 10, "hidden_dropout": 0.1, "attention_dropout": 0.1}), []
    backend = lambda graph, inputs: counts.append(1) or graph.forward  # noqa: E731
    for block in gpt.layers.values():
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    gpt(tokens(seed=0), samples=torch.tensor([0, 1]), step=torch.tensor(0)).sum().backward()
    assert len(counts) == 1
