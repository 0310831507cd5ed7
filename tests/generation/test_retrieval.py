"""Text of a Retro, written token by token with its neighbours, against one forward pass over all of it."""

import pytest
import torch

import megalith
from megalith.common.errors import ConfigError
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.engine import Engine
from megalith.generation.generate import complete, score
from megalith.generation.parallel.runner import runner_of
from megalith.generation.request import Request
from megalith.generation.sampling import SamplingParams
from megalith.testing.ranks import run_ranks
from tests.retro_texts import FORMS, LAYOUTS, VOCABULARY, M, make, neighbors_of, teacher_forced


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (1, M - 1, M, 2 * M + 2, 131)]


@pytest.mark.parametrize("form", FORMS)
def test_written_tokens_have_the_logits_of_a_whole_pass(form):
    model = make(form)
    options = {"max_new_tokens": 3 * M + 1, "logprobs": True, "prompt_logprobs": True, "seed": 3}
    for found in complete(model, prompts(), **options, batch_size=3):  # rows are taken again by the last two
        ids = [*found.prompt_ids, *found.ids]
        expected = teacher_forced(model, ids).log_softmax(-1).gather(1, torch.tensor([*ids[1:], 0])[:, None])[:-1, 0]
        measured = torch.tensor([*found.prompt_logprobs, *found.logprobs], dtype=torch.float64)
        torch.testing.assert_close(measured, expected, rtol=2e-6, atol=2e-6)  # measured in float32


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_prompts_in_pieces_and_of_single_tokens(form):
    """In float64, two rows of different lengths, one of which is read in pieces that end inside chunks."""
    model, (_, _, _, short, long) = make(form), prompts()
    runner, texts = runner_of(model, 2, 64), (long, short)
    pieces = [(0, 0, 13), (0, 13, 15), (1, 0, 3), (0, 15, 32)]  # row, first token, last + 1
    found: list[list[torch.Tensor]] = [[], []]
    for row, first, last in pieces:
        ids = texts[row][first:last]
        found[row] += runner.prefill([PrefillChunk(row, ids, first, keep=len(ids))])
    for place in range(3, len(short)):
        both = runner.decode([0, 1], [long[32 + place - 3], short[place]], [32 + place - 3, place])
        found[0].append(both[0])
        found[1].append(both[1])
    for row, text in enumerate(texts):
        text = text[: len(found[row])]
        torch.testing.assert_close(torch.stack(found[row]), teacher_forced(model, text), rtol=1e-10, atol=1e-10)


def test_the_retriever_is_asked_once_for_each_whole_chunk():
    asked, model = [], make("absolute")
    model.retriever = lambda chunk: asked.append(list(chunk)) or neighbors_of(chunk)
    (found,) = complete(model, [prompts()[3]], max_new_tokens=2 * M, greedy=True)
    ids = [*found.prompt_ids, *found.ids[:-1]]  # the last token is read by no call
    assert asked == [ids[first : first + M] for first in range(0, len(ids) // M * M, M)]


def texts_in(layout: dict[str, int]) -> list[tuple[list[int], list[float]]]:
    """On one process of a layout: prompts of 1 to 131 tokens, several rows at a time, chunks ending at other steps."""
    model = make("absolute")
    if layout:
        model = megalith.load(model.model, device="cpu", dtype=torch.float64, **layout)
    model.retriever = neighbors_of
    found = complete(model, prompts(), max_new_tokens=3 * M + 1, logprobs=True, seed=3, batch_size=3)
    return [(each.ids, each.logprobs) for each in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_by_several_processes_are_those_of_one(layout):
    ranks, sizes = LAYOUTS[layout]
    expected = texts_in({})
    for found in run_ranks(texts_in, ranks, sizes):
        for (ids, logprobs), (wanted, values) in zip(found, expected, strict=True):
            assert ids == wanted
            assert logprobs == pytest.approx(values, abs=2e-6)


def test_without_a_retriever_it_writes_as_a_gpt():
    with_neighbors, model = make("absolute"), make("absolute")
    model.retriever = None
    text = prompts()[4]
    with torch.no_grad():
        expected = model(torch.tensor([text]))[0].log_softmax(-1)
    (found,) = score(model, [text])
    alone = expected[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), alone, rtol=2e-6, atol=2e-6)
    assert max(abs(one - other) for one, other in zip(found, score(with_neighbors, [text])[0])) > 1e-3


def test_equal_prompts_are_read_each_for_itself():
    """What a row holds of neighbours is not copied with its keys and values."""
    model = make("absolute")
    engine, text = Engine(model, max_batch_size=2, max_length=160), prompts()[4]
    events = {}
    for _ in range(3):
        number = engine.add(Request(prompt_ids=text, params=SamplingParams(max_new_tokens=8, temperature=0.0)))
        while engine.busy:
            for event in engine.step():
                events.setdefault(number, []).append(event.token)
    assert len({tuple(tokens) for tokens in events.values()}) == 1
    assert not engine.prefill.prefix_caching


def test_what_a_retriever_excludes_is_said():
    model = make("absolute")
    with pytest.raises(ConfigError, match="--beam-width must be left out with a retriever"):
        complete(model, [[1, 2]], beam_width=2, max_new_tokens=2)
    with pytest.raises(ConfigError, match="--compile must be left out with a retriever"):
        Engine(model, max_batch_size=1, compile=True)
