"""Texts that end at a line's end, and colons without newlines, by the tokens of several tokenizers."""

import itertools
import re

import pytest
import torch

from megalith.common.errors import ConfigError
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.generation.generate import complete
from megalith.generation.newlines import newline_tokens
from tests.data.tokenizers.vocabularies import gpt2, needs_shared
from tests.generation.vocabularies import make_tokenizer

WITH_NEWLINES = ["GPT2BPETokenizer", "HuggingFaceTokenizer bytes", "Llama2Tokenizer bytes", "TikTokenizer"]
WITHOUT = ["BertWordPieceLowerCase", "NullTokenizer", "SentencePieceTokenizer unigram"]


@needs_shared
def test_gpt2_has_those_that_megatron_names() -> None:
    """Megatron stops at 198 and 628; the third newline of the vocabulary is followed by a no-break space."""
    tokenizer = gpt2()
    found = newline_tokens(tokenizer, tokenizer.vocab_size)
    assert (found.any, found.double, found.ending) == ({198, 628, 44320}, {628}, {198, 628})
    assert found.starting == {198, 628, 44320}
    assert len(found.banned_after) == 23 and set(found.banned_after[25]) == found.starting
    assert newline_tokens(tokenizer, tokenizer.vocab_size) is found  # not computed again
    assert newline_tokens(tokenizer, 200).any == {198}  # no token beyond those that the model has


@pytest.mark.parametrize("name", WITH_NEWLINES)
def test_tokens_with_newlines(name: str, tmp_path) -> None:
    tokenizer = make_tokenizer(name, tmp_path)
    found = newline_tokens(tokenizer, tokenizer.vocab_size)
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    assert {texts[token] for token in found.any} >= {"\n"} and ":" in {texts[token] for token in found.banned_after}
    assert found.any == {token for token, text in texts.items() if re.search("\n", text)}
    assert found.double == {token for token, text in texts.items() if re.search("\n\n", text)}
    assert found.starting == {token for token, text in texts.items() if re.match("\n", text)}
    assert found.ending == {token for token, text in texts.items() if re.search(r"\n\Z", text)}
    assert found.banned_after.keys() == {token for token, text in texts.items() if re.search(r":\Z", text)}
    assert name != "TikTokenizer" or (found.double and found.ending - found.starting)  # "\n\n" and ":\n"


@pytest.fixture(params=WITH_NEWLINES)
def model(request: pytest.FixtureRequest, make, tmp_path):
    tokenizer = make_tokenizer(request.param, tmp_path)
    made = make(torch.float64, vocab_size=tokenizer.vocab_size, init_method_std=0.02)  # nearly uniform
    made.tokenizer = tokenizer
    return made


def likely(tokenizer: Tokenizer) -> dict[int, float]:
    """Biases with which every other token or so has a newline or a colon."""
    found = newline_tokens(tokenizer, tokenizer.vocab_size)
    return dict.fromkeys((*found.any, *found.banned_after), 5.0)


def line_end(texts: list[str], before: str, double: bool, least: int) -> int | None:
    """How many tokens a text has where it ends at the first newline, or empty line, after `least` tokens."""
    for count, text in enumerate(texts, 1):
        joint = double and (texts[count - 2] if count > 1 else before).endswith("\n") and text.startswith("\n")
        if count > least and (joint or ("\n\n" if double else "\n") in text):
            return count
    return None


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("least", [0, 3])
def test_texts_end_at_a_line(double: bool, least: int, model) -> None:
    """Where nothing may end them earlier they begin as those that do not end there: draws depend on the position."""
    tokenizer, rule = model.tokenizer, "stop_on_double_eol" if double else "stop_on_eol"
    options = {"seed": 3, "num_samples": 24, "max_new_tokens": 12, "stop_at_eod": False}
    options["logit_bias"] = likely(tokenizer)
    prompt, ends = tokenizer.encode("Once upon") + sorted(newline_tokens(tokenizer, 999).ending)[:1], set()
    free = complete(model, [prompt], **options)
    ended = complete(model, [prompt], min_new_tokens=least, **{rule: True}, **options)
    for whole, made in zip(free, ended):
        texts = [tokenizer.decode([i]) for i in made.ids]
        end = line_end(texts, tokenizer.decode(prompt), double, least)
        assert (end or 12, "length" if end is None else "stop") == (len(made.ids), made.finish)
        assert least or made.ids == whole.ids[: len(made.ids)]
        if end is not None and tokenizer.options.tokenizer_type != "HuggingFaceTokenizer":  # which spoils runs of bytes
            assert "\n" in made.continuation[-2:]  # it is part of the text
        ends.add(end)
    assert len(ends) > 2


def test_no_newline_follows_a_colon(model) -> None:
    tokenizer = model.tokenizer
    found = newline_tokens(tokenizer, tokenizer.vocab_size)
    colon = next(token for token in found.banned_after if tokenizer.decode([token]) == ":")
    options = {"seed": 5, "num_samples": 12, "max_new_tokens": 12, "logit_bias": likely(tokenizer)}
    prompt = [*tokenizer.encode("Once upon"), colon]  # counts as well

    def newlines_after_colons(made) -> int:
        ids = [colon, *made.ids]
        return sum(a in found.banned_after and b in found.starting for a, b in itertools.pairwise(ids))

    free = complete(model, [prompt], **options)
    kept = complete(model, [prompt], prevent_newline_after_colon=True, **options)
    assert sum(map(newlines_after_colons, free)) > 5 and sum(map(newlines_after_colons, kept)) == 0
    assert any("\n" in made.continuation for made in kept)


@pytest.mark.parametrize("rule", ["stop_on_eol", "stop_on_double_eol", "prevent_newline_after_colon"])
@pytest.mark.parametrize("name", WITHOUT)
def test_tokenizers_without_newlines_are_named(name: str, rule: str, make, tmp_path) -> None:
    tokenizer = make_tokenizer(name, tmp_path)
    model = make(vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    kind = name.split()[0]
    with pytest.raises(ConfigError, match=f"^--{rule.replace('_', '-')} must be off, .* no token of {kind} has a new"):
        complete(model, [[5]], **{rule: True})
    model.tokenizer = None
    with pytest.raises(ConfigError, match="must be off, because this model has no tokenizer"):
        complete(model, [[5]], **{rule: True})
