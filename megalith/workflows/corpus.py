"""A real corpus that every machine has: the sources of Python's standard library, and the texts of its help topics."""

from __future__ import annotations

import json
import pathlib
import random
import sysconfig

from megalith.common.files import atomic_path


def write_corpus(path: pathlib.Path, megabytes: float, seed: int = 1) -> tuple[int, int]:
    """Write at most `megabytes` MB of documents as JSON lines {"text", "source"}; returns (documents, bytes of text).

    Documents are shuffled, so that training and validation splits are alike.
    """
    documents = sorted(_modules()) + sorted(_topics())
    random.Random(seed).shuffle(documents)
    count = size = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for source, text in documents:
            if size > megabytes * 1e6:
                break
            file.write(json.dumps({"text": text, "source": source}) + "\n")
            count, size = count + 1, size + len(text.encode())
    return count, size


def _modules():
    """Sources of the standard library, without those that are long tables rather than text: tests, encodings."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"} & set(
            inside.parts
        ):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > 200 and "\ufffd" not in text:
            yield str(inside), text


def _topics():
    """The language reference as `help("topics")` shows it."""
    from pydoc_data.topics import topics

    yield from ((f"help/{name}", text) for name, text in topics.items())
