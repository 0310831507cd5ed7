"""Lines of JSON as chats and completions: the forms that there are, and what is wrong with others."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.instructions.records import read_chat, read_completion, read_object

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def read(function, record):
    """What is read, and the lines about it."""
    notes: list[str] = []
    return function(record, notes.append), notes


@pytest.mark.parametrize(
    ("record", "prompt", "words"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, "Hi", []),
        ({"instruction": "Hi", "output": "Hello"}, "Hi", ["'instruction' is read as the prompt, and 'output'"]),
        ({"instruction": "Hi", "input": "x", "output": "Hello"}, "Hi\n\nx", ["empty line and 'input'"]),
        ({"question": "Hi", "answer": "Hello", "id": 3}, "Hi", ["'question'"]),
        ({"prompt": "", "completion": "Hello"}, "", []),
    ],
)
def test_completions(record, prompt, words):
    found, notes = read(read_completion, record)
    assert (found.prompt, found.answer, found.weight) == (prompt, "Hello", 1.0)
    assert len(notes) == len(words) and all(word in line for word, line in zip(words, notes))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "x"}, "no prompt under .*it has 'text'"),
        ({"prompt": "x"}, "no answer under"),
        ({"prompt": "x", "completion": ""}, "nothing to learn"),
        ({"prompt": "x", "completion": "y", "output": "z"}, "2 keys of an answer: 'completion', 'output'"),
        ({"prompt": "x", "question": "x", "completion": "y"}, "2 keys of a prompt"),
        ({"prompt": 3, "completion": "y"}, "'prompt' is no text but int"),
        ({"prompt": "x", "completion": "y", "weight": -1}, "'weight' is -1"),
        ({"prompt": "x", "completion": "y", "weight": "much"}, "'weight' is 'much'"),
    ],
)
def test_what_is_no_completion(record, words):
    with pytest.raises(ValueError, match=words):
        read(read_completion, record)


def test_chats():
    chat, notes = read(read_chat, {"messages": [USER, ANSWER], "weight": 0.5})
    assert list(chat.messages) == [USER, ANSWER] and chat.trained == [True] and chat.weight == 0.5 and not notes
    shared = [{"from": "system", "value": "B"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    chat, notes = read(read_chat, {"conversations": shared})
    assert list(chat.messages) == [{"role": "system", "content": "B"}, USER, ANSWER]
    assert notes and all("ShareGPT" in line for line in notes)
    chat, notes = read(read_chat, {"prompt": "Hi", "completion": "Hello"})
    assert list(chat.messages) == [USER, ANSWER] and any("two turns" in line for line in notes)
    chat, notes = read(read_chat, {"messages": [{**USER, "role": "developer"}, USER, ANSWER]})
    assert chat.messages[0]["role"] == "system" and notes == ["role 'developer' is read as 'system'"]
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert list(read(read_chat, {"messages": [USER, {**ANSWER, "content": parts}]})[0].messages) == [USER, ANSWER]


def test_tools_and_weights_of_turns_reach_the_template():
    tools, call = [{"type": "function"}], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    turns = [USER, {**call, "weight": 0}, {"role": "tool", "content": "4"}, {**ANSWER, "weight": 1}]
    for given_tools in (tools, json.dumps(tools)):
        record = {"messages": turns, "tools": given_tools, "chat_template_kwargs": {"think": False}}
        chat, _ = read(read_chat, record)
        assert chat.variables == {"tools": tools, "think": False} and chat.trained == [False, True]
        assert chat.messages[1]["tool_calls"] == [{"name": "f"}] and "weight" not in chat.messages[1]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "no list of messages"),
        ("hi", "no list of messages"),
        (["hi"], r"messages\[0\] is no object but str"),
        ([USER], "no turn of the assistant"),
        ([ANSWER, USER], "wrong order: turn 1, of assistant, is the first turn"),
        ([USER, USER, ANSWER], "wrong order: turn 2, of user, is after a turn of user"),
        ([USER, ANSWER, ANSWER], "wrong order: turn 3"),
        ([USER, {**USER, "role": "system"}, ANSWER], "wrong order: turn 2, of system"),
        ([USER, {"role": "bot", "content": "x"}], r"messages\[1\] has role 'bot', and none of system"),
        ([USER, {"role": "assistant"}], r"messages\[1\] has no content"),
        ([USER, {**ANSWER, "content": ""}], "is empty"),
        ([USER, {**ANSWER, "content": 3}], "is no text but int"),
        ([USER, {**ANSWER, "content": [{"type": "image_url"}]}], "parts that are no text"),
        ([USER, {**ANSWER, "weight": 0}], "every turn of the assistant has weight 0"),
        ([USER, {**ANSWER, "weight": 0.5}], "must be 0 or 1"),
    ],
)
def test_what_is_no_chat(turns, words):
    with pytest.raises(ValueError, match=words):
        read(read_chat, {"messages": turns})


def test_two_chats_in_one_line_are_refused():
    with pytest.raises(ValueError, match="two chats"):
        read(read_chat, {"messages": [USER, ANSWER], "conversations": []})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "malformed JSON"),
        (b"[1]", "a JSON list"),
        (b"3", "not a JSON object but int"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\udc01"}', "half of a character"),
    ],
)
def test_lines_that_are_no_objects(line, words):
    with pytest.raises(ValueError, match=words):
        read_object(line)


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.text()))
def test_every_object_is_read(record):
    assert read_object(json.dumps(record).encode()) == record
