"""Scores of a Retro: its logits with the neighbours of a text's chunks, in every layout; without them, a GPT's."""

import numpy as np
import pytest
import torch

import megalith
from megalith.common.errors import ConfigError
from megalith.evaluation.scoring import Sample, Scorer
from megalith.generation.model import TextModel
from megalith.testing.ranks import run_ranks
from tests.retro_texts import LAYOUTS, VOCABULARY, M, make, neighbors_of, teacher_forced


def samples() -> list[Sample]:
    """Shorter than a chunk, of whole chunks, and longer; as arrays and as lists."""
    random = np.random.RandomState(0)
    texts = [random.randint(0, VOCABULARY, length) for length in (2, M, M + 1, 3 * M + 1, 4 * M + 3, 60)]
    return [Sample(ids if number % 2 else ids.tolist(), len(ids) - 1) for number, ids in enumerate(texts)]


def expected(model: TextModel) -> np.ndarray:
    found = []
    for ids, scored in samples():
        ids = list(map(int, ids))
        logs = teacher_forced(model, ids)[:-1].log_softmax(-1)
        wanted = torch.tensor(ids[1:])
        right = (logs.argmax(-1) == wanted)[-scored:].sum()
        found.append([-float(logs.gather(1, wanted[:, None])[-scored:].sum()), float(right)])
    return np.array(found)


def scores(layout: dict[str, int]) -> np.ndarray:
    """On one process of a layout."""
    model = make("absolute")
    if layout:
        model = megalith.load(model.model, device="cpu", dtype=torch.float64, **layout)
    model.retriever = neighbors_of
    return Scorer(model, batch_size=4)(samples())


def test_scores_are_those_of_a_whole_pass():
    np.testing.assert_allclose(scores({}), expected(make("absolute")), rtol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    ranks, sizes = LAYOUTS[layout]
    for found in run_ranks(scores, ranks, sizes):
        np.testing.assert_allclose(found, scores({}), rtol=2e-6)


def test_without_neighbors_it_is_measured_as_a_gpt_and_that_is_said():
    model = make("absolute")
    model.retriever = lambda chunk: ()
    found = Scorer(model)(samples())
    model.retriever = None
    with pytest.warns(UserWarning, match="reads no neighbours, and is measured as a GPT: give --retro-workdir"):
        scorer = Scorer(model)
    assert np.array_equal(found, scorer(samples()))
    assert np.abs(found - expected(make("absolute")))[2:, 0].min() > 1e-3


def test_a_chunk_that_windows_share_is_looked_up_once():
    asked, model = [], make("absolute")
    model.retriever = lambda chunk: asked.append(chunk) or neighbors_of(chunk)
    ids = np.arange(8 * M + 1) % VOCABULARY
    Scorer(model)([Sample(ids[first : first + 4 * M + 1], M) for first in range(0, 4 * M + 1, M)])
    assert len(asked) == len(set(asked)) == 8


def test_context_parallelism_is_refused():
    with pytest.raises(ConfigError, match="--context-parallel-size must be 1 for a Retro"):
        run_ranks(scores, 2, {"context_parallel_size": 2})
