"""Greedy decoding and beams against transformers' own `generate`, with the same weights."""

import pytest
import torch

from megalith.generation.beam import beam_search
from megalith.generation.generate import complete

PROMPTS = [[5, 17, 3, 60, 2], [9], [44, 44, 8]]


@pytest.mark.parametrize("case", ["gpt2", "llama, groups", "bloom", "qwen3"])
def test_greedy_equals_transformers(case: str, pair) -> None:
    both = pair(case)
    mine = complete(both.model, PROMPTS, max_new_tokens=40, top_k=1)
    for prompt, made in zip(PROMPTS, mine):
        ids = torch.tensor([prompt])
        theirs = both.original.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert made.prompt_ids + made.ids == theirs[0].tolist()


def test_beams_without_stop_equal_transformers(pair) -> None:
    both, ids = pair("gpt2"), torch.tensor(PROMPTS[:1])
    theirs = both.original.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=10,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    mine = beam_search(both.model, PROMPTS[0], beam_width=4, max_new_tokens=10)
    assert [made.prompt_ids + made.ids for made in mine] == theirs.sequences.tolist()
    assert [made.score for made in mine] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
