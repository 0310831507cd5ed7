"""Reading with a cache gives the logits of reading everything again, in every form of the model and for rows of any
length.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalith.generation.cache import BLOCK, KVCache
from megalith.generation.cached_attention import PrefillCache, PrefillChunk, spans
from megalith.generation.model import TextModel
from megalith.generation.runner import ModelRunner

FORMS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "rope": {"position_embedding_type": "rope"},
    "rope, interleaved, a half": {
        "position_embedding_type": "rope",
        "rotary_interleaved": True,
        "rotary_percent": 0.5,
    },
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
LENGTH = 70 + BLOCK + 10


def logits_without_cache(model: TextModel, rows: list[list[int]]) -> torch.Tensor:
    """The logits after each row, each read alone and from its start."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])


def runner_of(model: TextModel, rows: int, length: int = LENGTH, **how: Any) -> ModelRunner:
    return ModelRunner(model.model, KVCache(model.model, rows, length), **how)


def read(runner: ModelRunner, rows: list[list[int]]) -> torch.Tensor:
    return runner.prefill([PrefillChunk(number, row) for number, row in enumerate(rows)])


def step(runner: ModelRunner, rows: list[list[int]], tokens: list[int]) -> torch.Tensor:
    """Append a token to each of `rows`, and the same tokens in the cache."""
    positions = [len(row) for row in rows]
    for row, token in zip(rows, tokens):
        row.append(token)
    return runner.decode(range(len(rows)), tokens, positions)


@pytest.mark.parametrize(
    ("fixed_shapes", "batch_invariant"),
    [(False, True), (True, True), (False, False)],
    ids=["", "fixed shapes", "loose"],
)
@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_reading_everything_again(
    form: str, prompts: list[list[int]], fixed_shapes: bool, batch_invariant: bool, make
) -> None:
    model, rows = make(torch.float64, **FORMS[form]), [list(prompt) for prompt in prompts]
    runner = runner_of(model, len(rows) + fixed_shapes, batch_invariant=batch_invariant)
    runner.decoding.whole_rows = fixed_shapes  # the shapes of a CUDA graph
    logits = read(runner, rows)
    for nth in range(BLOCK + 5):  # past the place where a row has one more block
        if nth % 16 < 3:
            # Float32 angles: 1e-6
            torch.testing.assert_close(logits, logits_without_cache(model, rows), rtol=0, atol=1e-6)
        logits = step(runner, rows, logits.argmax(dim=-1).tolist())


def test_float32_is_close_and_bfloat16_near(make) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        model, rows = make(dtype), [list(row) for row in RAGGED]
        runner = runner_of(model, 4)
        read(runner, rows)
        logits = step(runner, rows, [1, 2, 3, 4])
        assert logits.dtype == dtype and (logits - logits_without_cache(model, rows)).abs().max() < tolerance


@pytest.mark.parametrize("form", ["absolute", "llama", "alibi", "window"])
def test_a_prompt_can_be_read_in_pieces(form: str, make) -> None:
    model = make(torch.float64, **FORMS[form])
    runner, rows = runner_of(model, 3), [RAGGED[2], RAGGED[0]]
    runner.prefill([PrefillChunk(1, rows[0][:30]), PrefillChunk(0, rows[1][:2])])
    runner.prefill([PrefillChunk(1, rows[0][30:33], 30)])
    logits = runner.prefill([PrefillChunk(0, rows[1][2:], 2), PrefillChunk(1, rows[0][33:], 33)])
    torch.testing.assert_close(logits, logits_without_cache(model, rows[::-1]), rtol=0, atol=1e-6)
    everything = runner.prefill([PrefillChunk(2, rows[0], keep=len(rows[0]))])
    with torch.no_grad():
        torch.testing.assert_close(everything, model(torch.tensor([rows[0]]))[0], rtol=0, atol=1e-6)
    several = runner.prefill([PrefillChunk(0, rows[1], keep=2), PrefillChunk(1, rows[0], keep=0)])
    torch.testing.assert_close(several[1:], logits_without_cache(model, [rows[1]]), rtol=0, atol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([64, 128, 192])), max_size=12))
def test_spans_cover_all_rows_once(steps: list[tuple[int, int]]) -> None:
    """Each is one stretch of neighbouring rows of one length, and as long as possible."""
    rows = list(itertools.accumulate(step for step, _ in steps))
    lengths = [length for _, length in steps]
    found = spans(rows, lengths)
    assert [index for first, last, _, _ in found for index in range(first, last)] == list(range(len(rows)))
    for first, last, row, length in found:
        assert rows[first:last] == list(range(row, row + last - first)) and set(lengths[first:last]) == {length}
    for (_, end, _, length), (first, _, next_row, next_length) in itertools.pairwise(found):
        assert end == first and (next_length != length or rows[end - 1] + 1 != next_row)


def test_select_moves_copies_and_drops_rows(make) -> None:
    model = make(torch.float64)
    runner, rows = runner_of(model, 4), [list(row) for row in (*RAGGED[:2], *RAGGED[3:], [1, 2])]
    read(runner, rows)
    step(runner, rows, [1, 2, 3, 4])
    chosen = [3, 0, 0]
    runner.cache.select(torch.tensor(chosen), max(map(len, rows)))
    rows = [list(rows[row]) for row in chosen]
    torch.testing.assert_close(step(runner, rows, [8, 9, 10]), logits_without_cache(model, rows), rtol=0, atol=1e-10)
    runner.cache.select(torch.tensor([0, 2, 1]), len(rows[1]), start=len(rows[1]) - 1)  # their last tokens differ
    rows = [list(rows[row]) for row in (0, 2, 1)]
    torch.testing.assert_close(step(runner, rows, [8, 9, 10]), logits_without_cache(model, rows), rtol=0, atol=1e-10)


def test_memory_is_kept_and_what_others_left_is_not_seen(make) -> None:
    model = make(torch.float64)
    runner = runner_of(model, 4)
    where = [each.keys.data_ptr() for each in runner.cache.layers.values()]
    for each in runner.cache.layers.values():
        each.keys.fill_(1e6), each.values.fill_(1e6)
    for rows in ([list(row) for row in RAGGED], [[3], [4, 5], [6], [7]]):
        read(runner, rows)
        torch.testing.assert_close(
            step(runner, rows, [1, 2, 3, 4]), logits_without_cache(model, rows), rtol=0, atol=1e-10
        )
    assert where == [each.keys.data_ptr() for each in runner.cache.layers.values()]


def test_bytes_are_told(make) -> None:
    model = make(num_query_groups=2)
    cache = KVCache(model.model, 3, 100)
    rows, layers, kinds, place, places = 3, 2, 2, 2 * 8 * 4, 128
    assert cache.bytes_allocated == rows * cache.bytes_per_row == rows * layers * kinds * place * places
    assert [cache.add(id, places) for id, places in ((7, 100), (8, 1), (9, 65))] == [0, 1, 2]
    assert cache.bytes_of(8) == cache.bytes_per_row // 2 and cache.bytes_in_use == cache.bytes_per_row * 5 // 2
    for each in cache.layers.values():
        each.keys.copy_(torch.arange(3.0).view(3, 1, 1, 1).expand_as(each.keys))
    cache.remove(8)
    cache.remove(7)
    assert cache.bytes_in_use == cache.bytes_of(9) and list(cache.free) == [1, 0]
    assert cache.add(10, 70, row=0, kept=(64, 0)) == 0  # what is kept stays, what is not is cleared where reserved
    for each in cache.layers.values():
        assert bool((each.keys[1] == 1).all()) and not each.keys[0].any()
    cache.copy(2, 0, 5)
    for each in cache.layers.values():
        assert bool((each.keys[0, :, :5] == 2).all()) and not each.keys[0, :, 5:].any() and cache.filled[0] == 5
    cache.remove(9), cache.remove(10)
    assert cache.bytes_in_use == 0 and list(cache.free) == [1, 2, 0]


def test_a_row_of_its_own_reads_what_training_reads(make) -> None:
    """Prefill is the training forward's own attention: bit for bit."""
    model, ids = make(), torch.tensor([RAGGED[2]])
    with torch.no_grad():
        view = PrefillCache(KVCache(model.model, 1, 100), [PrefillChunk(0, RAGGED[2])])
        assert torch.equal(model(ids, cache=view), model(ids))
        keep = torch.tensor([3, 69, 0, 5])  # four, as MKL multiplies fewer rows by another kernel
        assert torch.equal(model(ids, logits_to_keep=keep), model(ids)[:, keep])


@pytest.mark.slow
def test_compiled_step_is_one_graph_and_never_compiled_again(make) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = make(position_embedding_type="alibi", num_query_groups=2), CompileCounter()
    runner = runner_of(model, 5, 100)
    runner.run = torch.compile(runner._decode, backend=counter, dynamic=False, fullgraph=True)
    runner.decoding.whole_rows = runner.decoding.compiled = True
    for prompts in (RAGGED, [row[::-1] for row in RAGGED], RAGGED[:2]):
        rows = [list(row) for row in prompts]
        logits = read(runner, rows)
        for _ in range(20):
            logits = step(runner, rows, logits.argmax(dim=-1).tolist())
        torch.testing.assert_close(logits, logits_without_cache(model, rows), rtol=0, atol=1e-4)
    assert counter.frame_count == 1
