"""Model FLOPs: the published formulas, and torch's own counter on the built model."""

import pytest

from megalith.config.sections.model import ModelConfig
from megalith.planner.flops import flops_per_token, keys_seen


def test_megatrons_formula():
    """72 l h^2 (1 + s/6h + V/12lh) per token for the shape of GPT-2 (arXiv 2104.04473 without the recomputation)."""
    layers, h, s, V = 24, 2048, 1024, 50304
    config = ModelConfig(
        num_layers=layers, hidden_size=h, num_attention_heads=16, vocab_size=V, max_position_embeddings=s
    )
    assert flops_per_token(config, s) == pytest.approx(
        72 * layers * h**2 * (1 + s / (6 * h) + V / (12 * layers * h)), rel=1e-12
    )


def test_palms_formula_in_both_conventions():
    """6 N + 12 L H Q T per token (PaLM, appendix B), N the weights that multiply; causal half: half the second term."""
    config = ModelConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        kv_channels=32,
        num_query_groups=2,
        swiglu=True,
        ffn_hidden_size=96,
        vocab_size=100,
        untie_embeddings_and_output_weights=True,
    )
    weights = 3 * (64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 96) + 64 * 100
    attention = 12 * 3 * 4 * 32 * 256
    assert flops_per_token(config, 256) == 6 * weights + attention
    assert flops_per_token(config, 256, causal_half=True) == 6 * weights + attention / 2


FORMS = [
    {},
    {"num_query_groups": 2, "swiglu": True, "position_embedding_type": "rope"},
    {"attention_head_type": "multiquery", "kv_channels": 20},
]


@pytest.mark.parametrize("form", FORMS, ids=["gpt2", "gqa-swiglu", "mqa"])
def test_equal_to_torchs_counter(form):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megalith.models.gpt import GPT

    sequence, batch = 16, 2
    config = ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "max_position_embeddings": sequence,
            "vocab_size": 50,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "attention_backend": "explicit",
            **form,
        }
    )
    model = GPT(config)
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert counter.get_total_flops() == flops_per_token(config, sequence) * batch * sequence


def test_of_bert():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megalith.models.bert import BERT

    config = ModelConfig(
        model_type="bert",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=16,
        vocab_size=50,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend="explicit",
        bert_no_binary_head=True,
    )
    with FlopCounterMode(display=False) as counter:
        BERT(config)(torch.zeros(2, 16, dtype=torch.int64)).sum().backward()
    assert (
        counter.get_total_flops()
        == flops_per_token(config, 16) * 2 * 16
        == flops_per_token(config, 16, causal_half=True) * 2 * 16
    )


def test_windows_take_the_place_of_the_sequence():
    shape = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    whole, slid = ModelConfig(**shape), ModelConfig(**shape, sliding_window=10, full_attention_layers=[1])
    kept = 12 * 64 * 2 * (256 - 10)  # two of the three layers
    assert flops_per_token(whole, 256) - flops_per_token(slid, 256) == kept
    seen = sum(min(place + 1, 10) for place in range(256)) / 256  # the first tokens see fewer
    assert keys_seen(256, 10, True) == pytest.approx(seen, abs=0.03) and keys_seen(256, None, True) == 128
    assert keys_seen(8, 10, False) == 8


def test_an_encoder_and_a_decoder():
    """Each product by hand: 2 + 1 layers of width 8 with 2 heads of 4, 6 and 4 tokens, a vocabulary of 10."""
    model = ModelConfig(
        model_type="t5", num_layers=2, decoder_num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=10
    )
    attention, mlp = 4 * 64, 2 * 8 * 32
    encoder = 2 * (6 * (attention + mlp) + 2 * 6 * 6 * 8)
    decoder = 4 * (attention + mlp) + 2 * 4 * 4 * 8 + 4 * 2 * 64 + 6 * 2 * 64 + 2 * 4 * 6 * 8
    assert flops_per_token(model, 6, False, 4) == pytest.approx(6 * (encoder + decoder + 4 * 80) / 6)
    assert flops_per_token(model, 6, True, 4) == pytest.approx(6 * (encoder + decoder - 4 * 4 * 8 + 4 * 80) / 6)


@pytest.mark.parametrize(
    "form", [{}, {"num_query_groups": 2, "swiglu": True, "retro_encoder_layers": 3, "retro_num_neighbors": 3}]
)
def test_retro_is_equal_to_torchs_counter(form):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megalith.config.run import RunConfig
    from megalith.models.retro import Retro
    from megalith.testing import batches

    config = RunConfig().replace(
        model_type="retro", num_layers=3, hidden_size=32, num_attention_heads=4, max_position_embeddings=16,
        vocab_size=50, seq_length=16, retro_layer_numbers=[1, 3], retro_gpt_chunk_length=4, global_batch_size=2,
        hidden_dropout=0.0, attention_dropout=0.0, attention_backend="explicit", **form,
    )  # fmt: skip
    model, batch = Retro(config.model).eval(), batches.retro(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch["input_ids"], neighbor_tokens=batch["neighbor_tokens"], neighbor_mask=batch["neighbor_mask"])
    assert flops_per_token(config.model, 16) == pytest.approx(3 * counter.get_total_flops() / 32, rel=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("contexts", [1, 3])
def test_a_bi_encoder_is_equal_to_torchs_counter(shared, contexts):
    """The projection is left out, as BERT's pooler is: it works on one token of a text."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megalith.config.run import RunConfig
    from megalith.models.biencoder import BiEncoder
    from megalith.testing import batches

    config = RunConfig().replace(
        model_type="ict", num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=16,
        vocab_size=50, seq_length=16, global_batch_size=2, biencoder_shared_query_context_model=shared,
        biencoder_projection_dim=8, hidden_dropout=0.0, attention_dropout=0.0, attention_backend="explicit",
    )  # fmt: skip
    model, batch = BiEncoder(config.model).eval(), batches.ict(config, contexts=contexts)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch["query_ids"], context_ids=batch["context_ids"])
    projections = 2 * 2 * (1 + contexts) * 32 * 8
    expected = 3 * (counter.get_total_flops() - projections) / 32
    assert flops_per_token(config.model, 16, contexts=contexts) == pytest.approx(expected, rel=1e-12)
