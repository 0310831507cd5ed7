"""How `megalith generate` shows texts: to the terminal as they are written, or as records of a file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SEPARATOR = "-" * 40  # between two texts


def to_record(completion: Any) -> dict[str, Any]:
    """A Completion as an object of --out-file."""
    score = {} if completion.score is None else {"score": completion.score}
    return {
        "prompt": completion.prompt,
        "continuation": completion.continuation,
        "tokens": len(completion.ids),
        "finish": completion.finish,
        **score,
    }


def print_texts(completions: Iterable[Any]) -> None:
    """Print whole texts, one after another."""
    for number, completion in enumerate(completions):
        if number:
            print(SEPARATOR)
        print(completion.text)


class StreamPrinter:
    """Writes texts to the terminal piece by piece, one after another; a prompt is shown before its first piece."""

    def __init__(self, prompts: list[str], num_samples: int):
        self.prompts, self.num_samples, self.row = prompts, num_samples, -1

    def __call__(self, row: int, token: int, piece: str) -> None:
        if row != self.row:
            if self.row >= 0:
                print(f"\n{SEPARATOR}")
            self.row = row
            print(self.prompts[row // self.num_samples], end="")
        print(piece, end="", flush=True)

    def close(self) -> None:
        """End the last line."""
        print()
