"""Cached decoding gives the logits of reading everything again, in every form of the model and for rows of any length."""

from typing import Any

import pytest
import torch

from megalith.generation.cache import STEP, CachedAttention, Decoder, Reading
from megalith.layers.attention import CoreAttention
from megalith.layers.mask import AttentionMask
from megalith.layers.positions import alibi_slopes

FORMS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "rope": {"position_embedding_type": "rope"},
    "rope, interleaved, a half": {"position_embedding_type": "rope", "rotary_interleaved": True, "rotary_percent": 0.5},
    "alibi": {"position_embedding_type": "alibi"},
    "alibi, three heads": {"position_embedding_type": "alibi", "num_attention_heads": 3, "kv_channels": 10},
    "none": {"position_embedding_type": "none"},
    "multiquery": {"attention_head_type": "multiquery"},
    "groups, alibi": {"num_query_groups": 2, "position_embedding_type": "alibi"},
    "llama": {
        "use_rotary_position_embeddings": True,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "num_query_groups": 2,
    },
    "qwen3": {"position_embedding_type": "rope", "qk_layernorm": True, "untie_embeddings_and_output_weights": True},
    "window": {"position_embedding_type": "rope", "sliding_window": 7, "full_attention_layers": [1]},
    "window, alibi": {"position_embedding_type": "alibi", "sliding_window": 30, "num_query_groups": 2},
    "side by side": {"parallel_attn": True, "embed_layernorm": True, "attention_head_type": "multiquery"},
    "explicit": {"attention_backend": "explicit"},
}
RAGGED = [[5, 9, 200, 17, 3], [250], list(range(40, 110)), [7, 7, 7]]
EVEN = [[5, 9, 200], [1, 2, 3], [4, 5, 299]]


def again(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """The logits after each row, each read alone and from its start."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])


@pytest.mark.parametrize("compile", [False, True], ids=["", "fixed shapes"])
@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_reading_everything_again(form: str, prompts: list[list[int]], compile: bool, make) -> None:
    model, rows = make(torch.float64, **FORMS[form]), [list(prompt) for prompt in prompts]
    cores = [layer.attention.core for layer in model.layers.values()]
    decoder = Decoder(model, 70 + STEP + 10)
    decoder.fixed = compile  # the shapes of a compiled step, without waiting for a compiler
    with decoder:
        logits = decoder.read(rows)
        for step in range(STEP + 5):  # past the place where masks grow
            if step % 16 < 3:
                torch.testing.assert_close(logits, again(model_of(decoder, cores), rows), rtol=0, atol=1e-6)  # float32 angles: 1e-6
                reinstall(decoder)
            tokens = logits.argmax(dim=-1)
            rows = [row + [token] for row, token in zip(rows, tokens.tolist())]
            logits = decoder.step(tokens)
    assert [layer.attention.core for layer in model.layers.values()] == cores and not model.head._forward_pre_hooks


def model_of(decoder: Decoder, cores: list[CoreAttention]) -> torch.nn.Module:
    """The decoder's model as it is outside of its block."""
    decoder.__exit__()
    assert [layer.attention.core for layer in decoder.model.layers.values()] == cores
    return decoder.model


def reinstall(decoder: Decoder) -> None:
    decoder.__enter__()


def test_float32_is_close_and_bfloat16_near(make) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        model, rows = make(dtype), [list(row) for row in RAGGED]
        with Decoder(model, 100) as decoder:
            decoder.read(rows)
            logits = decoder.step(torch.tensor([1, 2, 3, 4]))
        expected = again(model, [row + [token] for row, token in zip(rows, (1, 2, 3, 4))])
        assert logits.dtype == dtype and (logits - expected).abs().max() < tolerance


def test_select_moves_copies_and_drops_rows(make) -> None:
    model = make(torch.float64)
    with Decoder(model, 100) as decoder:
        decoder.read(RAGGED)
        decoder.step(torch.tensor([1, 2, 3, 4]))
        decoder.select(torch.tensor([3, 0, 0]))
        logits = decoder.step(torch.tensor([8, 9, 10]))
    rows = [[*RAGGED[3], 4, 8], [*RAGGED[0], 1, 9], [*RAGGED[0], 1, 10]]
    torch.testing.assert_close(logits, again(model, rows), rtol=0, atol=1e-10)


def test_memory_is_kept_from_one_use_to_the_next(make) -> None:
    model = make(torch.float64)
    decoder = Decoder(model, 100)
    with decoder:
        decoder.read(RAGGED)
        decoder.step(torch.tensor([1, 2, 3, 4]))
    where = [core.keys.data_ptr() for core in decoder.cores.values()]
    with decoder:
        decoder.read([[3], [4, 5], [6], [7]])  # shorter: what the longer ones left must not be seen
        logits = decoder.step(torch.tensor([1, 2, 3, 4]))
    assert where == [core.keys.data_ptr() for core in decoder.cores.values()]
    torch.testing.assert_close(logits, again(model, [[3, 1], [4, 5, 2], [6, 3], [7, 4]]), rtol=0, atol=1e-10)


def test_an_error_gives_the_model_back(make) -> None:
    model = make()
    cores = [layer.attention.core for layer in model.layers.values()]
    with pytest.raises(RuntimeError, match="mine"), Decoder(model, 10) as decoder:
        decoder.read([[1]])
        raise RuntimeError("mine")
    assert [layer.attention.core for layer in model.layers.values()] == cores
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 300)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("form", [{}, {"window": 5}, {"slopes": alibi_slopes(4)}, {"window": 7, "slopes": alibi_slopes(4)}], ids=str)
def test_core_reads_in_pieces_what_it_reads_at_once(form: dict[str, Any], kv_heads: int, tokens: int) -> None:
    """Windows too, which no config has yet; and several tokens a step, at another place in each row."""
    mask, length, first = AttentionMask(**form), 21, (9, 13)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    expected = CoreAttention(0.0, "s", "explicit")(q, k, v, mask)
    reading = Reading(32)
    core = CachedAttention(reading, None).double()
    reading.set(None, max(first), False)
    torch.testing.assert_close(core(q[:, :, :13], k[:, :, :13], v[:, :, :13], mask), expected[:, :, :13])
    for step in range(2):
        places = torch.tensor([[start + step * tokens + i for i in range(tokens)] for start in first])
        reading.set(places, 32, False)
        pick = places[:, None, :, None]
        got = core(*(x.gather(2, pick.expand(-1, x.shape[1], -1, 8)) for x in (q, k, v)), mask)
        torch.testing.assert_close(got, expected.gather(2, pick.expand(-1, 4, -1, 8)))


@pytest.mark.slow
def test_compiled_step_is_one_graph_and_never_compiled_again(make) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = make(position_embedding_type="alibi", num_query_groups=2), CompileCounter()
    decoder = Decoder(model, 100)
    decoder.call, decoder.fixed = torch.compile(model, backend=counter, dynamic=False, fullgraph=True), True
    for prompts in (RAGGED, [row[::-1] for row in RAGGED]):
        rows = [list(row) for row in prompts]
        with decoder:
            logits = decoder.read(rows)
            for _ in range(20):
                tokens = logits.argmax(dim=-1)
                rows = [row + [token] for row, token in zip(rows, tokens.tolist())]
                logits = decoder.step(tokens)
        torch.testing.assert_close(logits, again(model, rows), rtol=0, atol=1e-4)
    assert counter.frame_count == 1
