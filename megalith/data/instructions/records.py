"""A line of JSON as a chat or as a prompt with its answer, in the forms that people's data have.

Reasons for which a line is neither are ValueErrors of a few words: the caller adds file and line.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megalith.common.json_lines import LONE_SURROGATE, parse, parse_object

# Keys of the two texts of a line, the usual one first; `input` beside another prompt is appended to it (Alpaca's form).
PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "output", "answer", "target")
CONTEXT = "input"
# Whose turn it is: the names of ShareGPT's `from`, and newer ones of OpenAI's `role`, to those that templates know.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
BEFORE = {  # role -> the roles that its turn may follow; None: it may be the first
    "system": (None, "system"),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
Notice = Callable[[str], object]  # is given a line on how data of another form than the usual one are read


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and its answer. weight: of each of its tokens in the loss."""

    prompt: str
    answer: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages with role and content, as templates take them.

    variables: others of the template (tools). trained: of each turn of the assistant, whether it is to be learned.
    weight: of each token in the loss.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained: Sequence[bool] = ()
    weight: float = 1.0


def read_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError that says why there is none."""
    record = parse_object(line)
    # A half of a character, which no text has, is always written as an escape.
    if b"\\ud" in line.lower() and (half := LONE_SURROGATE.search(json.dumps(record, ensure_ascii=False))):
        raise ValueError(f"malformed JSON (it has {half[0]!a}, which is half of a character)")
    return record


def read_completion(record: Mapping[str, Any], notice: Notice) -> Completion:
    """The prompt and the answer of a line. Raises ValueError where it has none, or several."""
    prompts = [key for key in PROMPTS if record.get(key) is not None]
    answers = [key for key in ANSWERS if record.get(key) is not None]
    if len(prompts) > 1 and CONTEXT in prompts:
        prompts.remove(CONTEXT)
    for kind, found, known in (("prompt", prompts, PROMPTS), ("answer", answers, ANSWERS)):
        if not found:
            has = ", ".join(map(repr, list(record)[:8]))
            raise ValueError(f"no {kind} under {' or '.join(map(repr, known))} (it has {has or 'nothing'})")
        if len(found) > 1:
            raise ValueError(f"{len(found)} keys of a{'n' * (kind == 'answer')} {kind}: {', '.join(map(repr, found))}")
    texts = [_text(record[key], repr(key)) for key in (prompts[0], answers[0])]
    joined = ""
    if prompts[0] != CONTEXT and record.get(CONTEXT):
        texts[0] += "\n\n" + _text(record[CONTEXT], repr(CONTEXT))
        joined = f", followed by an empty line and {CONTEXT!r} where there is one,"
    if (prompts[0], answers[0]) != (PROMPTS[0], ANSWERS[0]) or joined:
        notice(f"{prompts[0]!r}{joined} is read as the prompt, and {answers[0]!r} as its completion")
    if not texts[1]:
        raise ValueError(f"{answers[0]!r} is empty, so there is nothing to learn")
    return Completion(texts[0], texts[1], _weight(record))


def read_chat(record: Mapping[str, Any], notice: Notice) -> Chat:
    """The chat of a line. Raises ValueError where it has none, or turns in an order that no chat has."""
    keys = [key for key in ("messages", "conversations") if record.get(key) is not None]
    if len(keys) > 1:
        raise ValueError("two chats, 'messages' and 'conversations'")
    if not keys:
        pair = read_completion(record, notice)
        notice("lines with a prompt and an answer are read as chats of two turns")
        turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
        return Chat(turns, _variables(record), [True], pair.weight)
    turns = record[keys[0]]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{keys[0]!r} is no list of messages")
    messages = [_message(turn, f"{keys[0]}[{number}]", notice) for number, turn in enumerate(turns)]
    _check_order([message["role"] for message in messages])
    answers = [message for message in messages if message["role"] == "assistant"]
    trained = [_counts(message.pop("weight", 1)) for message in answers]
    if not any(trained):
        raise ValueError("every turn of the assistant has weight 0, so there is nothing to learn")
    return Chat(messages, _variables(record), trained, _weight(record))


def _message(turn: Any, where: str, notice: Notice) -> dict[str, Any]:
    """A message with a role of BEFORE and, unless it calls tools, a text."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is no object but {type(turn).__name__}")
    shared = "from" in turn and "role" not in turn  # ShareGPT's form
    role, content = ("from", "value") if shared else ("role", "content")
    if turn.get(role) not in ROLES:
        raise ValueError(f"{where} has {role} {turn.get(role)!r}, and none of {', '.join(ROLES)}")
    name = ROLES[turn[role]]
    if shared:
        notice("turns with 'from' and 'value' (ShareGPT's) are read as messages: human as user, gpt as assistant")
    elif name != turn[role]:
        notice(f"role {turn[role]!r} is read as {name!r}")
    rest = {key: value for key, value in turn.items() if key not in (role, content) and value is not None}
    text = turn.get(content)
    if isinstance(text, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in text):
            raise ValueError(f"{where}.{content} has parts that are no text")
        text = "".join(_text(part.get("text"), f"{where}.{content}") for part in text)
    if text is None and not rest.get("tool_calls"):
        raise ValueError(f"{where} has no {content}")
    if text == "" and name == "assistant" and not rest.get("tool_calls"):
        raise ValueError(f"{where}, a turn of the assistant, is empty")
    return {"role": name, "content": text if text is None else _text(text, f"{where}.{content}"), **rest}


def _check_order(roles: Sequence[str]) -> None:
    before: str | None = None
    for number, role in enumerate(roles):
        if before not in BEFORE[role]:
            after = "the first turn" if before is None else f"a turn of {before}"
            raise ValueError(f"turns in the wrong order: turn {number + 1}, of {role}, is {_placed(before, after)}")
        before = role
    if "assistant" not in roles:
        raise ValueError("no turn of the assistant, so there is nothing to learn")


def _placed(before: str | None, after: str) -> str:
    return after if before is None else f"after {after}"


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the template: `tools` (a list or its JSON), and `chat_template_kwargs` as in requests of servers."""
    tools, more = record.get("tools"), record.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        tools = parse(tools) if tools.strip() else None
    if not isinstance(tools, list | None) or not isinstance(more, dict):
        raise ValueError("'tools' must be a list, and 'chat_template_kwargs' an object")
    return {**more, **({"tools": tools} if tools else {})}


def _counts(weight: Any) -> bool:
    """Whether a message counts, by the `weight` of OpenAI's format."""
    if weight not in (0, 1):
        raise ValueError(f"a message's weight is {weight!r}, and must be 0 or 1; a line's may be any number")
    return bool(weight)


def _weight(record: Mapping[str, Any]) -> float:
    weight = record.get("weight", 1.0)
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"'weight' is {weight!r}, and must be a number above 0")
    return float(weight)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text but {type(value).__name__}")
    return value
