"""How `megalith generate` shows texts: to the terminal as they are written, or as records of a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

SEPARATOR = "-" * 40  # between two texts
SCORES = ("logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs", "score")  # where requested


def to_record(completion: Any) -> dict[str, Any]:
    """A Completion as an object of --out-file; with the token numbers where it has log-probabilities."""
    scores = {name: getattr(completion, name) for name in SCORES if getattr(completion, name) is not None}
    ids = {"prompt_ids": completion.prompt_ids, "ids": completion.ids} if scores.keys() - {"score"} else {}
    return {
        "prompt": completion.prompt,
        "continuation": completion.continuation,
        "tokens": len(completion.ids),
        "finish": completion.finish,
        **ids,
        **scores,
    }


def print_texts(completions: Iterable[Any]) -> None:
    """Print whole texts, one after another."""
    for number, completion in enumerate(completions):
        if number:
            print(SEPARATOR)
        print(completion.text)


class StreamPrinter:
    """Writes texts to the terminal piece by piece, one after another."""

    def __init__(self, prompts: Sequence[str]):
        """prompts: what is shown before the first piece of each text."""
        self.prompts, self.number = prompts, -1

    def __call__(self, number: int, token: int, piece: str) -> None:
        if number != self.number:
            if self.number >= 0:
                print(f"\n{SEPARATOR}")
            self.number = number
            print(self.prompts[number], end="")
        print(piece, end="", flush=True)

    def close(self) -> None:
        """End the last line."""
        print()
