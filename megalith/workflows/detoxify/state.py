"""Which steps are done, in files beside what they made: a step that is done is not done again, one that was killed is
resumed, and one that would now be another is an error.

state/NAME.json of a step has its settings, the fingerprints of what it reads, and once it is done those of what it has
made. It is written before the step begins, so that what then lies there is known to be of these settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.store import folder as checkpoints
from megalith.common.errors import DataError, problem
from megalith.common.files import sampled_digest, write_text
from megalith.common.urls import is_url
from megalith.config.flags.text import Words

BLOCKS = 64  # of 4 KiB, whose digest shows whether a file is the one that was read or written
STATE = "state"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """settings: what its result depends on beside `inputs`, files and folders by flag or by name. outputs: names in the
    pipeline's folder. work: does it; after a kill it is called again, and finds its outputs as it had left them.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str | pathlib.Path]
    outputs: Sequence[str]
    work: Callable[[], None]


class State:
    """The steps of a folder, which the caller has locked."""

    def __init__(self, folder: pathlib.Path, notice: Callable[[str], None]):
        """Raises DataError for a folder of other files."""
        self.folder, self.notice = folder, notice
        self.marks = folder / STATE
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        others = [name for name in found if not name.startswith(".")]
        if others and not self.marks.is_dir():
            rule = "must be a new folder, or one of this verb"
            raise DataError(problem("--output", Words(f"{folder} with {others[0]}"), rule, "Name another folder"))

    def run(self, step: Step, overwrite: bool) -> bool:
        """Do the step unless it is done; whether it was to be done.

        Raises DataError where it was begun or done in another way, or its outputs were changed, unless `overwrite`.
        """
        mark = self.marks / f"{step.name}.json"
        wanted = {"settings": plain(step.settings), "inputs": self.fingerprints(step)}
        found = read(mark)
        if difference := self.difference(step, found, wanted):
            if not overwrite:
                cure = "Add --overwrite, which makes it and what follows anew, or choose another --output"
                rule = "must be as when it was begun, because what is made is not replaced unasked"
                raise DataError(problem(f"Step {step.name}", Words(difference), rule, cure))
            self.clear(step, mark)
            found = None
        if found is not None and found["outputs"] is not None:
            self.notice(f"{step.name}: done already")
            return False
        self.notice(f"{step.name}: {'begins' if found is None else 'resumes'}")
        write_text(mark, json.dumps(wanted | {"outputs": None}, indent=1) + "\n")
        step.work()
        made = {name: fingerprint(self.folder / name) for name in step.outputs}
        write_text(mark, json.dumps(wanted | {"outputs": made}, indent=1) + "\n")
        return True

    def describe(self, step: Step) -> str:
        """Whether a step is done, in a line."""
        mark = self.marks / f"{step.name}.json"
        found = read(mark)
        state = "to do" if found is None else "begun" if found["outputs"] is None else "done"
        return f"{step.name}: {state}, {', '.join(step.outputs)}"

    def difference(self, step: Step, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
        """The first thing in which a step is not as it was; "" where there is none. found: None before it begins."""
        if found is None:
            there = [self.folder / name for name in step.outputs if (self.folder / name).exists()]
            return f"{there[0]}, which it has not made" if there else ""
        for name in dict.fromkeys((*found["settings"], *wanted["settings"])):
            old, new = found["settings"].get(name), wanted["settings"].get(name)
            if old != new:
                return f"{name} {new!r}, which was {old!r}"
        for name in dict.fromkeys((*found["inputs"], *wanted["inputs"])):
            if found["inputs"].get(name) != wanted["inputs"].get(name):
                return f"another content of {name}"
        for name, digest in (found["outputs"] or {}).items():
            path = self.folder / name
            if not path.exists():
                return f"{path} gone"
            if fingerprint(path) != digest:
                return f"{path} changed"
        return ""

    def clear(self, step: Step, mark: pathlib.Path) -> None:
        """Remove what a step has made, and then its mark."""
        for name in step.outputs:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)

    def fingerprints(self, step: Step) -> dict[str, str]:
        """Those of what a step reads. Raises DataError where something is not there."""
        found = {}
        for name, path in step.inputs.items():
            if not is_url(str(path)) and not pathlib.Path(path).exists():
                cure = "Correct the path" if name.startswith("--") else "Do the steps before it"
                rule = "must be there" if name.startswith("--") else f"must be there for step {step.name}"
                raise DataError(problem(name, str(path), rule, cure))
            found[name] = fingerprint(path)
        return found


def read(mark: pathlib.Path) -> dict[str, Any] | None:
    """What a mark says; None where there is none. Raises DataError for one that this verb has not written."""
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        _ = found["settings"], found["inputs"], found["outputs"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"must be a file of this verb ({type(error).__name__}: {error})"
        raise DataError(problem("A step", str(mark), rule, "Remove it, and add --overwrite")) from None
    return found


def fingerprint(path: str | pathlib.Path) -> str:
    """Digest of a file, or of the files of a folder: of a run, of its checkpoint. A URL is its own."""
    if is_url(str(path)):
        return str(path)
    path = pathlib.Path(path)
    if path.is_file():
        return sampled_digest(path, BLOCKS)
    if checkpoints.is_megalith(path):
        path = checkpoints.find(path)
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith(".")):
        digest.update(f"{file.relative_to(path)} {sampled_digest(file, BLOCKS)}\n".encode())
    return digest.hexdigest()


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings))
