"""Pieces of text add up, are never half a character, and hold back what may be a stop text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.generation.stream import REPLACEMENT_CHARACTER, TextStream


def pieces(tokenizer, ids: list[int], prompt: list[int] = [], stops: tuple[str, ...] = ()) -> list[str]:  # noqa: B006
    stream, made = TextStream(tokenizer, prompt, stops), []
    for token in ids:
        made.append(stream.push(token))
        if stream.stopped:
            return made
    made.append(stream.finish())
    assert "".join(made) == stream.text
    return made


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


@given(st.lists(st.integers(0, 299), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_tokens_add_up_to_their_decoding(tokenizer, ids: list[int]) -> None:
    """Also bytes that are no UTF-8."""
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_stop_text_across_tokens_is_cut_off(tokenizer) -> None:
    ids = tokenizer.encode("one two\n\nthree")
    made = pieces(tokenizer, ids, stops=("\n\n", "never"))
    assert "".join(made) == "one two"
    assert len(made) < len(ids)
    assert "".join(pieces(tokenizer, tokenizer.encode("one two\n three"), stops=("\n\n",))) == "one two\n three"
    # Given out at the end
    assert "".join(pieces(tokenizer, tokenizer.encode("one two\n"), stops=("\n\n",))) == "one two\n"
    # The first to be complete
    assert "".join(pieces(tokenizer, tokenizer.encode("abcabd"), stops=("abd", "bca"))) == "a"
