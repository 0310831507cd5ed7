"""Generated text against transformers' `generate`, with the same weights: tokens, beams, log-probabilities; and text
from a model that is being trained.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import megalith
from megalith.generation.beam import beam_search
from megalith.generation.engine import Engine
from megalith.generation.generate import complete, score
from megalith.generation.model import TextModel
from tests.originals.families import MODELS, SHAPE, bloom, t5

DECODERS = MODELS | {"bloom, untied": bloom(tie_word_embeddings=False)}
ORIGINALS = DECODERS | {"t5": t5(), "t5 v1.1": t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)}
FAST = ["gpt2", "llama 3.1", "bloom, untied", "mistral", "qwen2, half slides", "qwen3", "t5"]
# Two are longer than the window of the case mistral, 7; with NEW tokens all are.
PROMPTS = [[5, 17, 3, 60, 2, 9, 9, 31, 77, 4, 8, 52], [9, 70, 23], [44, 44, 8, 1, 20, 35, 64], list(range(30, 53))]
NEW = 30
Pair = tuple[transformers.PreTrainedModel, TextModel]


def cases(names: Iterable[str]) -> list[Any]:
    """Names as parameters of a test; those that are not in FAST are slow."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Pair]:
    """`pair(name)`: an original with random weights, norms and biases too, and what `megalith.load` makes of it."""
    monkeypatch.setattr(TextModel, "decoder_start", 0)  # a T5's; usually its tokenizer knows it

    def make(name: str) -> Pair:
        torch.manual_seed(0)
        original = ORIGINALS[name]().float().eval()
        for module in original.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 1:
                    parameter.data += torch.randn_like(parameter) * 0.1
                elif not isinstance(module, torch.nn.Embedding) and module is not original.get_output_embeddings():
                    parameter.data *= 3.0  # so that the layers decide the next token, and not the last token alone
        return original, megalith.load(original, device="cpu")

    return make


def generated(original: transformers.PreTrainedModel, prompt: list[int], **options: Any) -> tuple[Any, list[list[int]]]:
    """All that transformers' `generate` returns for a prompt; and the new tokens of each text, to its stop token."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
    given = {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_scores": True}
    made = original.generate(ids, output_logits=True, **given, **options)
    stops, start = options["eos_token_id"] or [], 1 if original.config.is_encoder_decoder else len(prompt)
    rows = made.sequences[:, start:].tolist()
    ends = [next((n for n, token in enumerate(row, 1) if token in stops), len(row)) for row in rows]
    return made, [row[:end] for row, end in zip(rows, ends)]


@torch.no_grad()
def logprobs_of(original: transformers.PreTrainedModel, prompt: list[int], ids: list[int]) -> Tensor:
    """The log-probabilities of new tokens, read together with their prompt by transformers in one call."""
    if original.config.is_encoder_decoder:
        logits = original(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *ids[:-1]]])).logits
    else:
        logits = original(torch.tensor([prompt + ids[:-1]])).logits[:, len(prompt) - 1 :]
    return logits[0].log_softmax(dim=-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", cases(ORIGINALS))
def test_greedy(name: str, pair) -> None:
    """All prompts together, against transformers' one after the other: tokens, and their log-probabilities."""
    original, model = pair(name)
    together = complete(model, PROMPTS, max_new_tokens=NEW, temperature=0.0, logprobs=True)
    for prompt, made in zip(PROMPTS, together):
        theirs, (ids,) = generated(original, prompt)
        logits = torch.cat(theirs.logits)
        likeliest = logits.topk(2).values
        assert (likeliest[:, 0] - likeliest[:, 1]).min() > 1e-4  # rounding decides nothing
        assert made.ids == ids
        wanted = logits.log_softmax(dim=-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert made.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len({tuple(made.ids) for made in together}) == len(PROMPTS)  # the prompts matter
    assert max(len(set(made.ids)) for made in together) > 3


@pytest.mark.parametrize("name", cases(ORIGINALS))
def test_logprobs_of_samples(name: str, pair) -> None:
    """Texts of all kinds of tokens. Their log-probabilities are those before temperature and filters."""
    original, model = pair(name)
    options = {"num_samples": 2, "temperature": 2.0, "top_k": 60, "seed": 1}
    for made in complete(model, PROMPTS, max_new_tokens=NEW, logprobs=True, **options):
        assert len(set(made.ids)) > 12
        wanted = logprobs_of(original, made.prompt_ids, made.ids)
        assert made.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", cases(DECODERS))
def test_score(name: str, pair) -> None:
    original, model = pair(name)
    torch.manual_seed(2)
    texts = [torch.randint(SHAPE["vocab_size"], (length,)).tolist() for length in (2, 61, 17, 9, 40)]
    for text, found in zip(texts, score(model, texts, batch_size=3)):
        assert found == pytest.approx(logprobs_of(original, text[:1], text[1:]).tolist(), abs=1e-4)


@pytest.mark.parametrize("name", cases(ORIGINALS))
def test_beams(name: str, pair) -> None:
    """Without stop tokens: nothing ends before all of it is written, in either search."""
    original, model = pair(name)
    for prompt, width in zip(PROMPTS, (4, 2, 7)):
        theirs, ids = generated(original, prompt, num_beams=width, num_return_sequences=width, max_new_tokens=12)
        mine = beam_search(model, prompt, beam_width=width, max_new_tokens=12)
        assert [made.ids for made in mine] == ids and len(set(map(tuple, ids))) == width
        assert [made.score for made in mine] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        assert beam_search(model, prompt, beam_width=width, num_samples=2, max_new_tokens=12) == mine[:2]


@pytest.mark.parametrize("penalty", [-0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", cases(ORIGINALS))
def test_beams_that_stop(name: str, penalty: float, pair) -> None:
    """Two stop tokens. Where a longer text has no better score, transformers finds the same in all ways of ending.

    Otherwise early_stopping=False may end a little earlier and "never" later (see `beam_search`): what the one finds is
    no better, what the other finds is no worse.
    """
    original, model = pair(name)
    stopped = 0
    for prompt in PROMPTS[1:3]:
        (likely,) = beam_search(model, prompt, beam_width=1, max_new_tokens=8)
        given = {"max_new_tokens": NEW, "length_penalty": penalty}
        stops = [likely.ids[3], likely.ids[6]]
        mine = beam_search(model, prompt, beam_width=4, stop_token_ids=stops, logprobs=True, **given)
        for made in mine:
            logprobs = logprobs_of(original, prompt, made.ids)
            assert made.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
            assert made.score == pytest.approx(logprobs.sum().item() / len(made.ids) ** penalty, rel=1e-4)
            assert (made.finish == "stop") == (made.ids[-1] in stops)
            stopped += made.finish == "stop"
        options = {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": stops, **given}
        (early, early_ids), (late, late_ids) = (
            generated(original, prompt, early_stopping=when, **options) for when in (False, "never")
        )
        scores, low, high = ([made.score for made in mine], *(each.sequences_scores.tolist() for each in (early, late)))
        if penalty > 0.0:
            assert all(a - 1e-4 <= b <= c + 1e-4 for a, b, c in zip(low, scores, high))
        else:
            assert [made.ids for made in mine] == early_ids == late_ids
            assert scores == pytest.approx(low, rel=1e-4) and scores == pytest.approx(high, rel=1e-4)
    assert stopped or penalty > 0.0


def test_when_the_search_ends() -> None:
    """The one difference, by hand: what the next token is depends on the last one alone; 0 is the stop token.

    After two tokens [0] and [2, 0] are finished, with log(0.4) = -0.92 and log(0.35 x 0.6) / 2 = -0.78. The likeliest
    beam that goes on, [2, 4], has log(0.35 x 0.4) / 2 = -0.98: transformers ends. The step's likeliest continuation is
    [2, 0], better than the worst that is finished: as in Megatron the search goes on, and [2, 4, 0] with -0.66 is best.
    """
    table = torch.full((6, 6), 1 / 6)
    table[1] = torch.tensor([0.4, 0.0, 0.35, 0.25, 0.0, 0.0])
    table[2] = torch.tensor([0.6, 0.0, 0.0, 0.0, 0.4, 0.0])
    table[4] = torch.tensor([0.99, 0.002, 0.002, 0.002, 0.002, 0.002])
    config = transformers.GPT2Config(vocab_size=6, n_embd=6, n_layer=1, n_head=1, n_inner=6, tie_word_embeddings=False)
    original = transformers.GPT2LMHeadModel(config).eval()
    for parameter in original.parameters():
        parameter.data.zero_()
    original.transformer.wte.weight.data = torch.eye(6)
    norm, scale = original.transformer.ln_f, 1 / torch.eye(6)[0].std(correction=0)
    norm.weight.data.fill_(1.0)
    norm.bias.data.fill_(scale / 6)  # what the norm subtracts
    original.lm_head.weight.data = table.clamp(min=1e-9).log().t() / scale
    options = {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": [0], "max_new_tokens": 6}
    found = {when: generated(original, [1], early_stopping=when, **options)[1] for when in (True, False, "never")}
    assert found[True] == found[False] == [[2, 0], [0]]
    mine = beam_search(megalith.load(original), [1], beam_width=2, max_new_tokens=6, stop_token_ids=[0])
    assert [made.ids for made in mine] == found["never"] == [[2, 4, 0], [2, 0]]
    wanted = torch.tensor([0.35 * 0.4 * 0.99, 0.35 * 0.6]).log() / torch.tensor([3.0, 2.0])
    assert [made.score for made in mine] == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5"])
def test_a_model_generates_between_training_steps(name: str, pair) -> None:
    """Generating changes nothing in training, and a step of training changes all text that comes after it."""
    _, model = pair(name)
    never_asked = megalith.load(model)
    engine = Engine(model, max_batch_size=4, max_length=64)

    def texts(model: TextModel, engine: Engine) -> list:
        options = {"max_new_tokens": 20, "logprobs": True}
        greedy, drawn = (complete(engine, PROMPTS, temperature=t, seed=1, **options) for t in (0.0, 1.0))
        return [greedy, drawn, beam_search(model, PROMPTS[0], **options), name == "t5" or score(model, PROMPTS)]

    def train(model: TextModel) -> None:
        model.train()
        batch = torch.tensor([text[:7] for text in (PROMPTS[0], PROMPTS[2])])
        given = {"decoder_input_ids": batch} if name == "t5" else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = model(batch, labels=batch.roll(-1, 1), samples=torch.arange(2), step=torch.tensor(3), **given)
        losses.mean().backward()
        optimizer.step()
        model.eval()

    before = texts(model, engine)
    for each in (model, never_asked):
        train(each)
    for mine, other in zip(model.model.state_dict().items(), never_asked.model.state_dict().items(), strict=True):
        assert mine[0] == other[0] and torch.equal(mine[1], other[1])
    fresh, after = megalith.load(model), texts(model, engine)
    assert after == texts(fresh, Engine(fresh, max_batch_size=4, max_length=64))
    assert [made.ids for made in after[0]] != [made.ids for made in before[0]]
