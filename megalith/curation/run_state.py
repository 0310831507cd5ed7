"""What a run of corpus work has written before: the digest of settings and input, outputs, its working folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megalith.common.errors import DataError, problem
from megalith.common.files import sampled_digest, sha256, write_text
from megalith.common.outputs import check
from megalith.config.flags.text import Words
from megalith.curation.report import REPORTS
from megalith.data.corpus.preprocess_options import update_with_inputs

if TYPE_CHECKING:
    from megalith.curation.run import Run

PARTS_VERSION = 2  # raise when the meaning of stored parts changes
FINISHING = "finishing"  # marks, in the working folder, that outputs are being put in place
SAMPLES = 64  # blocks of 4 KiB whose digest shows whether an output is still the file that was written


def fingerprint(run: Run) -> str:
    """Digest of what the parts depend on: settings, files that settings name, and the input."""
    options = run.options
    settings = dataclasses.asdict(run.command)
    content = [
        PARTS_VERSION,
        run.command.name,
        settings,
        options.json_key or run.command.text_key,
        options.max_document_bytes,
    ]
    content += [run.part_bytes, options.dropped, options.on_error, pathlib.Path(run.output).suffix]
    digest = hashlib.sha256(json.dumps(content, default=str).encode())
    update_with_files(digest, run.command.files(run.output))
    update_with_inputs(digest, run.inputs)
    return digest.hexdigest()


def update_with_files(digest: Any, paths: Iterable[str]) -> None:
    """Add the contents of whole files to a digest of hashlib."""
    for path in paths:
        digest.update(bytes.fromhex(sha256(path)))


def existing_report(run: Run, files: Sequence[str]) -> dict | None:
    """The report of a run with these settings whose outputs are as it wrote them, else None.

    Raises DataError where other files are in the way.
    """
    overwrite = run.options.overwrite
    check(files, inputs=run.inputs.files, overwrite=True, flag="--output")
    existing = [file for file in files if os.path.lexists(file)]
    killed_while_finishing = _text(run.folder / "key") == run.key and (run.folder / FINISHING).exists()
    if overwrite or not existing or killed_while_finishing:
        return None
    try:
        report = json.loads(_text(pathlib.Path(run.beside(REPORTS[0]))))["steps"][-1]
        if report["key"] == run.key and all(
            sampled_digest(name, SAMPLES) == digest for name, digest in report["samples"].items()
        ):
            return report
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    if run.options.owned:
        return None
    rule = "names files made from other input or with other settings, which only --overwrite replaces"
    raise DataError(problem("--output", existing[0], rule, "Add --overwrite, or choose another output"))


def begin_work(run: Run) -> None:
    """Make the working folder, emptied where it belongs to other settings."""
    folder, marker = run.folder, run.folder / "key"
    if os.path.lexists(folder) and _text(marker) != run.key:
        if not marker.exists() and (not folder.is_dir() or os.listdir(folder)):
            rule = f"needs the folder {folder} for unfinished parts, but something else is there"
            found = Words("a folder of other files" if folder.is_dir() else "a file")
            raise DataError(problem("--output", found, rule, "Move it away, or choose another output"))
        run.notice(f"{folder} has parts of another input or other settings; starting anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, run.key)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
