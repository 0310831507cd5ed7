"""Retro: what neighbours may change and what not, which layers read them, and the GPT that is left without them."""

import pytest
import torch

from megalith.config.parameters import parameter_count, parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.models.gpt import GPT
from megalith.models.retro import Retro
from megalith.runtime.build import build_model
from megalith.testing import batches

M, LENGTH = 4, 20
CONFIG = RunConfig().replace(
    model_type="retro", num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=64,
    max_position_embeddings=32, seq_length=LENGTH, retro_layer_numbers=[2, 4], retro_gpt_chunk_length=M,
    hidden_dropout=0.0, attention_dropout=0.0, init_method_std=0.2, global_batch_size=3,
)  # fmt: skip
FORMS = {
    "absolute": {},
    "rotary": {
        "position_embedding_type": "rope", "num_query_groups": 2, "group_query_attention": True, "swiglu": True,
        "normalization": "RMSNorm", "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
    },
    "three neighbours": {"retro_num_neighbors": 3, "retro_num_retrieved_chunks": 1, "retro_encoder_layers": 1},
}  # fmt: skip


def build(**changes) -> tuple[Retro, dict[str, torch.Tensor]]:
    """A model and a batch whose chunks all have neighbours."""
    config = CONFIG.replace(**changes)
    model = build_model(config.model, torch.device("cpu"), torch.float64, seed=3)
    batch = batches.retro(config)
    batch["neighbor_mask"][..., :2] = 1
    return model, batch


def logits(model: Retro, batch: dict[str, torch.Tensor], **changed: torch.Tensor) -> torch.Tensor:
    names = ("neighbor_tokens", "neighbor_mask")
    arguments = {name: batch[name] for name in names if name in batch} | changed
    return model(arguments.pop("input_ids", batch["input_ids"]), **arguments)


@pytest.mark.parametrize("form", FORMS)
def test_neighbors_of_a_chunk_change_nothing_before_its_last_token(form):
    model, batch = build(**FORMS[form])
    before = logits(model, batch)
    for chunk in range(LENGTH // M):
        tokens = batch["neighbor_tokens"].clone()
        tokens[:, chunk] = (tokens[:, chunk] + 7) % 64
        changed = (logits(model, batch, neighbor_tokens=tokens) - before).abs().amax(dim=(0, 2))
        last = (chunk + 1) * M - 1
        assert changed[:last].max() == 0.0 if last else True
        assert changed[last] > 1e-6, "its last token reads them"
        assert changed[last:].min() > 1e-12, "and all behind it feel it"


def test_a_token_changes_nothing_before_it():
    """The encoder sees whole chunks: what it makes of a chunk's last token may not reach those before."""
    model, batch = build()
    before = logits(model, batch)
    for position in range(LENGTH):
        ids = batch["input_ids"].clone()
        ids[:, position] = (ids[:, position] + 5) % 64
        changed = (logits(model, batch, input_ids=ids) - before).abs().amax(dim=(0, 2))
        assert position == 0 or changed[:position].max() == 0.0
        assert changed[position] > 1e-6


def test_the_encoder_reads_the_chunk():
    """The same neighbours of another chunk are another memory: only what a chunk's tokens do to it is compared."""
    model, batch = build()
    seen = []
    encoder = model.layers["1"].encoder
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    logits(model, batch)
    ids = batch["input_ids"].clone()
    ids[:, M] = (ids[:, M] + 5) % 64  # of the second chunk
    logits(model, batch, input_ids=ids)
    difference = (seen[1] - seen[0]).abs().view(*batch["neighbor_tokens"].shape, -1).amax(dim=(0, 2, 3, 4))
    assert difference[0] == 0.0 and difference[1:].min() > 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_without_neighbors_it_is_the_gpt(form):
    model, batch = build(**FORMS[form])
    shapes = parameter_shapes(CONFIG.replace(**FORMS[form], model_type="gpt", retro_layer_numbers=[]).model)
    gpt = GPT(ModelConfig(**(vars(model.config) | {"model_type": "gpt"}))).double()
    gpt.load_state_dict({name: value for name, value in model.state_dict().items() if name in gpt.state_dict()})
    expected = gpt(batch["input_ids"])
    missing = logits(model, batch, neighbor_mask=torch.zeros_like(batch["neighbor_mask"]))
    assert torch.equal(missing, expected)
    assert torch.equal(model(batch["input_ids"]), expected)
    assert shapes.keys() == dict(gpt.named_parameters()).keys()
    assert (logits(model, batch) - expected).abs().max() > 1e-3


def test_any_length_gives_the_logits_of_a_longer_text():
    model, batch = build()
    whole = logits(model, batch)
    for length in range(1, LENGTH):
        chunks = length // M
        parts = {name: batch[name][:, :chunks] for name in ("neighbor_tokens", "neighbor_mask")}
        found = logits(model, batch, input_ids=batch["input_ids"][:, :length], **parts)
        torch.testing.assert_close(found, whole[:, :length], rtol=1e-10, atol=1e-10)


def test_missing_neighbors_have_no_influence_and_no_gradient_that_is_not_a_number():
    model, batch = build()
    mask = batch["neighbor_mask"].clone()
    mask[:, 1, 0] = 0
    mask[:, 2] = 0
    other = torch.where(mask.bool(), batch["neighbor_tokens"], (batch["neighbor_tokens"] + 9) % 64)
    found = [logits(model, batch, neighbor_mask=mask, neighbor_tokens=t) for t in (batch["neighbor_tokens"], other)]
    assert torch.equal(*found)
    found[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("layers", "numbers", "expected"),
    [
        (12, [], (5, 8, 11)), (15, [], (5, 8, 11, 14)), (16, [], (8, 11, 14)), (24, [], (8, 11, 14, 17, 20, 23)),
        (5, [], ()), (5, [2, 5], (1, 4)),
    ],
)  # fmt: skip
def test_layers_are_those_of_megatrons_rule_or_those_given(layers, numbers, expected):
    config = ModelConfig(model_type="retro", num_layers=layers, retro_layer_numbers=numbers)
    assert config.retrieval_layers == expected
    assert ModelConfig(model_type="gpt", num_layers=layers).retrieval_layers == ()


@pytest.mark.parametrize("form", FORMS)
def test_size_by_formula(form):
    """The GPT, and two cross attentions, and an encoder whose first layer has one more."""
    c = CONFIG.replace(**FORMS[form]).model
    h, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_kv_heads * c.head_dim
    bias, norm = c.add_bias_linear, (2 if c.norm == "layernorm" else 1) * h
    attention = 2 * h * q + 2 * h * kv + bias * (q + 2 * kv + h)
    mlp = (3 if c.gated else 2) * h * c.ffn_size + bias * ((2 if c.gated else 1) * c.ffn_size + h)
    encoder = c.retro_encoder_layers * (attention + mlp + 2 * norm) + attention + norm + norm
    more = 2 * (attention - bias * h + norm) + encoder
    gpt = CONFIG.replace(**FORMS[form], model_type="gpt").model
    assert parameter_count(c) == parameter_count(gpt) + more


def test_dropout_masks_of_neighbors_differ_and_do_not_depend_on_the_micro_batch():
    model, batch = build(
        hidden_dropout=0.3, attention_dropout=0.2, retro_encoder_hidden_dropout=0.3, retro_encoder_attention_dropout=0.2
    )
    model.train()
    keys = {"samples": torch.arange(3), "step": torch.tensor(0)}
    whole = logits(model, batch, **keys)
    single = [
        logits(model, {name: value[i : i + 1] for name, value in batch.items()}, samples=keys["samples"][i : i + 1],
               step=keys["step"]) for i in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(whole, torch.cat(single), rtol=1e-10, atol=1e-10)
    batch["neighbor_tokens"][:] = batch["neighbor_tokens"][:, :1, :1]  # equal neighbours of all chunks
    entered = model.enter(batch["neighbor_tokens"], batch["neighbor_mask"].bool(), keys["samples"], keys["step"])
    hidden = entered.hidden.detach()
    assert (hidden[0] != hidden[1]).any() and (hidden[0] != hidden[2]).any(), "each has masks of its own"


@pytest.mark.slow
def test_it_learns_to_copy_what_its_neighbors_hold():
    """Each chunk's first neighbour is the chunk itself and what follows it: all but the first chunk is told.

    Texts are random and new in every step, so that nothing else can be learned.
    """
    m, s, words, steps = 8, 32, 64, 400
    config = CONFIG.replace(
        num_layers=2, hidden_size=64, ffn_hidden_size=256, vocab_size=words, seq_length=s, retro_layer_numbers=[2],
        retro_encoder_layers=1, retro_gpt_chunk_length=m, init_method_std=0.1, retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
    )  # fmt: skip
    model = build_model(config.model, torch.device("cpu"), torch.float32, seed=3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        text = torch.randint(words, (16, s + m), generator=generator)
        told = text.unfold(1, 2 * m, m)  # of each chunk, it and the next
        other = torch.randint(words, told.shape, generator=generator)
        neighbors = torch.stack((told, other), dim=2)
        losses = model(
            text[:, :s], labels=text[:, 1 : s + 1], neighbor_tokens=neighbors,
            neighbor_mask=torch.ones_like(neighbors),
        )  # fmt: skip
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    assert losses[:, m - 1 :].mean() < 1.0  # of log(64) = 4.16
    assert losses[:, : m - 1].mean() > 4.0
