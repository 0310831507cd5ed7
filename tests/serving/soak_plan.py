"""What 64 clients of a soak test do, one thousand times, and what each must get. All of it is drawn from a seed."""

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

from megalith.generation.generate import complete
from megalith.generation.model import TextModel

PROMPTS = ("Once upon a time", "the model wrote", "Zürich, 東京", "naïve café; once more", "a", "small model, and " * 6)
KINDS = {"good": 70, "reads slowly": 6, "leaves": 10, "too large": 4, "malformed": 6, "wrong method": 4}  # per cent
MALFORMED = (b"{", b'{"prompts": ["a"', b"\xff\xfe", b"[]", b"", b'{"prompts": [NaN}', b'{"prompt": 5.5.5}')


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to ask for. seed: None for the likeliest tokens."""

    prompt: str
    tokens: int
    seed: int | None

    def alone(self, model: TextModel) -> str:
        """What it is when nobody else asks for anything."""
        how = {"top_k": 1} if self.seed is None else {"temperature": 0.8, "seed": self.seed}
        return complete(model, self.prompt, max_new_tokens=self.tokens, **how)[0].text


@dataclasses.dataclass(frozen=True)
class Route:
    """How a text is asked for, and where in the answer it is."""

    method: str
    path: str
    body: Callable[[Text], dict[str, Any]]
    text: Callable[[bytes], str]


@dataclasses.dataclass(frozen=True)
class Action:
    """One thing that a client does. chance: in [0, 1), for what the kind leaves open."""

    kind: str
    route: Route
    text: Text
    chance: float


def _api(text: Text) -> dict[str, Any]:
    how = {"top_k": 1} if text.seed is None else {"temperature": 0.8, "random_seed": text.seed}
    return {"prompts": [text.prompt], "tokens_to_generate": text.tokens, **how}


def _completions(text: Text) -> dict[str, Any]:
    how = {"temperature": 0} if text.seed is None else {"temperature": 0.8, "seed": text.seed}
    return {"prompt": text.prompt, "max_tokens": text.tokens, "echo": True, **how}


def _streamed(body: bytes) -> str:
    lines = [line for line in body.decode().split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines[-1:]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


ROUTES = (
    Route("PUT", "/api", _api, lambda body: json.loads(body)["text"][0]),
    Route("POST", "/v1/completions", _completions, lambda body: json.loads(body)["choices"][0]["text"]),
    Route("POST", "/v1/completions", lambda text: {**_completions(text), "stream": True}, _streamed),
)


def plan(actions: int, texts: int, seed: int) -> list[Action]:
    """So many actions over so many different texts."""
    draw = random.Random(seed)
    some = [
        Text(draw.choice(PROMPTS), draw.randint(1, 24), draw.choice((None, draw.randrange(1000)))) for _ in range(texts)
    ]
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=actions)
    return [Action(kind, draw.choice(ROUTES), draw.choice(some), draw.random()) for kind in kinds]
