"""A compiled engine on CPUs: nothing is compiled after warm_up, and a text does not depend on its neighbours."""

import pytest
import torch

from megalith.generation.engine import Engine, Request
from megalith.generation.params import SamplingParams

ROWS = 5  # more than the four that are padded to, so that there are two shapes
PROMPTS = [[5, 9, 200, 17, 3], [250], list(range(40, 70)), [7, 7, 7], [1, 2]]
NEW = 6


def requests() -> list[Request]:
    """Half of them sampled, of different lengths, so that the number of rows falls from five to one."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        new = NEW + 3 * number
        params = SamplingParams(temperature=float(number % 2), max_new_tokens=new, seed=number, logprobs=True)
        found.append(Request(prompt_ids=prompt, params=params))
    return found


def answers(engine: Engine, batches: list[list[Request]]) -> list[list[tuple[int, float]]]:
    """Tokens and log-probabilities of each request; the requests of a batch run together."""
    found = []
    for batch in batches:
        events: dict[int, list[tuple[int, float]]] = {engine.add(request): [] for request in batch}
        while engine.busy:
            for event in engine.step():
                events[event.id].append((event.token, event.logprob))
        found += events.values()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler on cores that others use
def test_nothing_is_compiled_after_warm_up_and_rows_do_not_matter(make) -> None:
    model = make(num_layers=1, num_query_groups=2, position_embedding_type="rope")
    engine = Engine(model, max_batch_size=ROWS, compile=True)
    engine.warm_up()
    with torch.compiler.set_stance("fail_on_recompile"):
        together = answers(engine, [requests()])
        alone = answers(engine, [[request] for request in requests()])
        pairs = answers(engine, [requests()[:2], requests()[2:4], requests()[4:]])
    assert together == alone == pairs  # to the last bit of the log-probabilities
    eager = answers(Engine(model, max_batch_size=ROWS), [requests()])
    assert [[token for token, _ in row] for row in together] == [[token for token, _ in row] for row in eager]
    for ours, theirs in zip(together, eager):
        torch.testing.assert_close([p for _, p in ours], [p for _, p in theirs], rtol=0, atol=1e-5)
