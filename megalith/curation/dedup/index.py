"""A stored index: the signatures of all documents that stayed, so that a later crawl is compared with them.

    DIR/000000/  manifest.json, digests, lengths, counts, shingles, bands, names   of one run's output
    DIR/000001/  ...

A run adds its own folder when its output is in place. Only runs with equal settings compare; others are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.common.files import fsync_directory, temporary_path
from megalith.config.flags.text import Words
from megalith.curation.dedup.origins import Lines
from megalith.curation.dedup.signatures import DIGEST
from megalith.curation.dedup.store import Piece

VERSION = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one run has added."""

    path: pathlib.Path
    manifest: dict[str, Any]

    def piece(self) -> Piece:
        """Its signatures, mapped into memory."""
        bands = self.manifest["settings"].get("bands", 0)
        return Piece(
            self._array("digests", DIGEST),
            self._array("lengths", np.int32),
            self._array("shingles", np.uint32),
            self._array("counts", np.int32),
            self._array("bands", np.uint64).reshape(bands, -1) if bands else np.zeros((0, 0), np.uint64),
        )

    def _array(self, name: str, dtype: Any) -> np.ndarray:
        path = self.path / name
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    def names(self) -> Lines:
        """`file:line` of each document."""
        return Lines(self._array("names", np.uint8))


def generations(folder: str, settings: dict[str, Any], output: str) -> list[Generation]:
    """What earlier runs have added, in order; what a run with this output has added itself ends the list.

    Raises DataError where an index was made with other settings.
    """
    found = []
    for path in sorted(pathlib.Path(folder).glob("[0-9]*/" + MANIFEST)):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["output"] == os.path.realpath(output):
            break
        if manifest["version"] != VERSION or manifest["settings"] != settings:
            rule = f"must be one that was made with the same settings, {json.dumps(settings)}"
            shown = Words(f"{path.parent}, of {json.dumps(manifest['settings'])}")
            raise DataError(problem("--index", shown, rule, "Give those settings, or another folder"))
        found.append(Generation(path.parent, manifest))
    return found


def _target(folder: pathlib.Path, output: str) -> pathlib.Path:
    """Where a run with this output writes: where it has written before, or after the last."""
    last = -1
    for path in sorted(folder.glob("[0-9]*/" + MANIFEST)):
        if json.loads(path.read_text(encoding="utf-8"))["output"] == os.path.realpath(output):
            return path.parent
        last = int(path.parent.name)
    return folder / f"{last + 1:06d}"


def add_generation(
    folder: str,
    settings: dict[str, Any],
    output: str,
    pieces: Iterable[tuple[Piece, np.ndarray]],
    names: Iterator[str],
    ready: Callable[[], None],
) -> None:
    """Write what a run adds, after all others; what a run of the same output has added is replaced.

    pieces: with the documents of each that stayed, bool [n]. names: of those documents, in order.
    """
    target = _target(pathlib.Path(folder), output)
    temporary = temporary_path(target)
    temporary.mkdir(parents=True)
    bands: list[np.ndarray] = []
    try:
        files = {name: open(temporary / name, "wb") for name in ("digests", "lengths", "counts", "shingles")}  # noqa: SIM115
        content = hashlib.sha256()
        for piece, stays in pieces:
            digests = piece.digests[stays].tobytes()
            content.update(digests)
            files["digests"].write(digests)
            files["lengths"].write(piece.lengths[stays].tobytes())
            if len(piece.counts):
                files["counts"].write(piece.counts[stays].tobytes())
                files["shingles"].write(piece.shingles[np.repeat(stays, piece.counts)].tobytes())
                bands.append(piece.bands[:, stays])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        np.concatenate(bands, 1).tofile(temporary / "bands") if bands else (temporary / "bands").touch()
        (temporary / "names").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        manifest = {"version": VERSION, "settings": settings, "output": os.path.realpath(output)}
        manifest["content"] = content.hexdigest()  # so that later runs notice a replaced one (Dedup.files)
        (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        ready()
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        fsync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
