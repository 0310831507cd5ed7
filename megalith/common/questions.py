"""Questions on standard input, each asked until its answer can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Questions:
    """Asks until an answer can be read; after the end of the input every question has its default."""

    def __init__(self) -> None:
        self.ended = False

    def text(self, question: str, default: str = "", shown: str | None = None) -> str:
        """One line of standard input; the default, shown in brackets (as `shown`), for an empty one."""
        shown = default if shown is None else shown
        try:
            return input(f"{question}{f' [{shown}]' if shown else ''}: ").strip() or default
        except EOFError:
            print()
            self.ended = True
            return default

    def choice(self, question: str, choices: Sequence[str], default: str) -> str:
        """One of several words, in small letters or large ones."""
        while True:
            word = self.text(f"{question}: {', '.join(choices)}", default)
            for choice in choices:
                if word.lower() == choice.lower():
                    return choice
            print(f"  the answer must be one of {', '.join(choices)}; found {word!r}")

    def number(self, question: str, default: int, divides: int = 0) -> int:
        """A whole number above 0, one that divides `divides`."""
        while True:
            text = self.text(question, str(default))
            if text.isdecimal() and int(text) > 0 and divides % int(text) == 0:
                return int(text)
            divisor = f", that divides {divides}" * (divides > 0)
            print(f"  {question} must be a whole number, at least 1{divisor}; found {text!r}")

    def real(self, question: str, default: float) -> float:
        """A finite number, at least 0."""
        while True:
            text = self.text(question, str(default))
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if 0 <= number < math.inf:
                return number
            print(f"  {question} must be a number, at least 0; found {text!r}")

    def yes(self, question: str, default: bool) -> bool:
        """Whether the answer is yes."""
        while True:
            shown = "YES/no" if default else "yes/NO"
            word = self.text(question, "yes" if default else "no", shown).lower()
            if word in ("yes", "y", "no", "n"):
                return word[0] == "y"
            print(f"  the answer must be yes or no; found {word!r}")
