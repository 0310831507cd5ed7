"""Pieces of text add up, whatever the tokenizer, are never half a character, and hold back what may be a stop text."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.generation.stream import REPLACEMENT_CHARACTER, TextStream
from tests.generation.vocabularies import CORPUS, NAMES, make_tokenizer

FUZZ = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module")
def tokenizer_named(tmp_path_factory: pytest.TempPathFactory):
    return functools.cache(lambda name: make_tokenizer(name, tmp_path_factory.mktemp("tokenizer")))


def pieces(tokenizer, ids: list[int], prompt: list[int] = [], stops: tuple[str, ...] = ()) -> list[str]:  # noqa: B006
    stream, made = TextStream(tokenizer, prompt, stops), []
    for token in ids:
        made.append(stream.push(token))
        if stream.stopped:
            break
    else:
        made.append(stream.finish())
    assert "".join(made) == stream.text
    return made


def first_stop(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the stop text that is complete first, of several the longest; character by character."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


def token_ids(tokenizer: Tokenizer, name: str) -> st.SearchStrategy[list[int]]:
    """Tokens in any order; for the decoder that gives up a whole run of bytes for one that is no UTF-8, without such
    bytes.
    """
    wrong = [i for i, token in enumerate(tokenizer.tokens()) if name == "HuggingFaceTokenizer bytes" and "<0x" in token]
    return st.lists(st.sampled_from([i for i in range(tokenizer.vocab_size) if i not in wrong]), max_size=25)


@pytest.mark.parametrize("name", NAMES)
def test_any_tokens_add_up_to_their_decoding(name: str, tokenizer_named) -> None:
    """Control tokens, bytes that are no UTF-8, spaces at the start: the text is what decoding all together gives."""
    tokenizer = tokenizer_named(name)
    ids = token_ids(tokenizer, name)

    @FUZZ
    @given(ids, ids)
    def check(prompt: list[int], new: list[int]) -> None:
        before, after = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
        made = "".join(pieces(tokenizer, new, prompt))
        if after.startswith(before):
            assert made == after[len(before) :]
        else:  # the prompt ended within a character, which the new tokens complete
            assert before.endswith(REPLACEMENT_CHARACTER)
            assert made == after[len(before.rstrip(REPLACEMENT_CHARACTER)) :]

    check()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "NullTokenizer"])
def test_texts_come_as_they_were_encoded(name: str, tokenizer_named) -> None:
    tokenizer = tokenizer_named(name)
    lossless = "unigram" not in name and "WordPiece" not in name
    for text in CORPUS:
        ids = tokenizer.encode(text)
        made = pieces(tokenizer, ids)
        assert "".join(made) == (text if lossless and "Llama" not in name else tokenizer.decode(ids))
        assert not lossless or not any(REPLACEMENT_CHARACTER in piece for piece in made)
        assert len(list(filter(None, made))) > len(text) // 10  # it comes in many pieces


@pytest.mark.parametrize("name", NAMES)
def test_stop_texts_equal_those_of_the_whole_text(name: str, tokenizer_named) -> None:
    """Stop texts cut out of the text itself, inside a token and across many, overlapping, and any others."""
    tokenizer, found = tokenizer_named(name), set()

    @FUZZ
    @given(token_ids(tokenizer, name), st.data())
    def check(ids: list[int], data: st.DataObject) -> None:
        text = tokenizer.decode(ids)
        cuts = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=3))
        stops = tuple(filter(None, (text[start : start + length] for start, length in cuts)))
        stops += data.draw(st.sampled_from([(), ("e ",), ("\n\n", "ae"), (REPLACEMENT_CHARACTER, "x")]))
        expected = first_stop(text, stops)
        assert "".join(pieces(tokenizer, ids, stops=stops)) == expected
        found.add(expected == text)

    check()
    assert found == {True, False}


def test_characters_of_several_tokens_come_whole(tokenizer) -> None:
    text = "été 日本語 👩‍👩‍👧 naïve 😀😀"
    ids = tokenizer.encode(text)
    made = pieces(tokenizer, ids)
    assert len(ids) > len(text) and "".join(made) == text
    assert not any(REPLACEMENT_CHARACTER in piece for piece in made)


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_text(tokenizer, before: str, text: str) -> None:
    assert "".join(pieces(tokenizer, tokenizer.encode(text), tokenizer.encode(before))) == text


def test_stop_text_across_tokens_is_cut_off(tokenizer) -> None:
    ids = tokenizer.encode("one two\n\nthree")
    made = pieces(tokenizer, ids, stops=("\n\n", "never"))
    assert "".join(made) == "one two"
    assert len(made) < len(ids)
    assert "".join(pieces(tokenizer, tokenizer.encode("one two\n three"), stops=("\n\n",))) == "one two\n three"
    # Given out at the end
    assert "".join(pieces(tokenizer, tokenizer.encode("one two\n"), stops=("\n\n",))) == "one two\n"
    # The first to be complete, and of those the longest
    assert "".join(pieces(tokenizer, tokenizer.encode("abcabd"), stops=("abd", "bca"))) == "a"
    assert "".join(pieces(tokenizer, tokenizer.encode("abcd"), stops=("c", "bc", "abcd"))) == "a"


class _TwoTokens:
    """A tokenizer of two tokens, which divide a character."""

    def decode(self, ids: list[int]) -> str:
        return b"".join((b"x\xe6", b"\x9d\xb1")[token] for token in ids).decode(errors="replace")


def test_a_stop_text_is_seen_beside_half_a_character() -> None:
    """The token that completes the stop text ends with half a character, and is the last."""
    stream = TextStream(_TwoTokens(), [], ["x"])  # type: ignore[arg-type]
    assert stream.push(0) == "" and stream.stopped
    stream = TextStream(_TwoTokens(), [], ["y"])  # type: ignore[arg-type]
    assert (stream.push(0), stream.push(1)) == ("x", "東")


def test_stop_texts_count_after_the_tokens_in_which_none_may_begin(tokenizer) -> None:
    stream = TextStream(tokenizer, [], ["a"])
    made = [stream.push(token, may_stop=number >= 2) for number, token in enumerate(tokenizer.encode("ababab"))]
    assert made[:3] == ["a", "b", ""] and stream.stopped and stream.text == "ab"
