"""Passages of few words, and questions whose answers some of them hold."""

import pathlib

PASSAGES = [(f"w{number}", " ".join(f"w{(7 * number + 5 * k) % 48}" for k in range(5))) for number in range(30)]
QUESTIONS = [  # no passage holds the answers of every fourth question
    (f"w{3 * number % 48} w{5 * number % 48}", [f"w{number} w{number + 5 + (number % 4 == 3)}", "nothing"])
    for number in range(12)
]


def write_evidence(path: pathlib.Path) -> pathlib.Path:
    """As DPR's psgs_w100.tsv; ids are 1, 2, ..."""
    lines = [f"{number}\t{text}\t{title}" for number, (title, text) in enumerate(PASSAGES, 1)]
    path.write_text("\n".join(["id\ttext\ttitle", *lines]) + "\n")
    return path


def write_questions(path: pathlib.Path) -> pathlib.Path:
    """As nq-dev.csv."""
    path.write_text("".join(f"{question}\t{answers}\n" for question, answers in QUESTIONS))
    return path
