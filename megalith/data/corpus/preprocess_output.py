"""What preprocessing writes: datasets, a report and, while it runs, a folder of finished parts.

This file knows which job wrote them, and whether they are sound.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.common.files import remove_leftovers, sampled_digest, temporary_path, write_text
from megalith.common.locks import locked
from megalith.common.outputs import check
from megalith.config.flags.text import Words
from megalith.data.indexed import IndexedDataset
from megalith.data.indexed.format import dataset_files

SAMPLES = 64  # blocks of 4 KiB of each file whose digest shows whether it is still the file that was written
Notice = Callable[[str], None]


class PreprocessOutput:
    """The files of one `--output-prefix`. prefixes: the prefix of each key's dataset."""

    def __init__(self, prefix: str, prefixes: Mapping[str, str]):
        """Name the files; nothing is touched."""
        self.prefix, self.prefixes = prefix, dict(prefixes)
        self.report = f"{prefix}_preprocess.json"
        self.parts = pathlib.Path(f"{prefix}.parts")
        self.datasets = dataset_files(self.prefixes.values())
        self._lock_checks: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def hold_locks(self, notice: Notice) -> Iterator[None]:
        """Hold the locks of the prefix and of every dataset (`merge` and others lock those too) in the block.

        What killed writers left is removed first.
        """
        with contextlib.ExitStack() as locks:
            outputs = (self.prefix, *self.prefixes.values())
            self._lock_checks = [locks.enter_context(locked(output, notice=notice)) for output in outputs]
            for file in (*self.prefixes.values(), *self.datasets, self.report):
                remove_leftovers(file, notice)
            yield

    def spool_folder(self) -> pathlib.Path:
        """A path for a folder of copied streams; `hold_locks` removes one that a killed call left."""
        return temporary_path(pathlib.Path(self.report))

    def existing_result(self, key: str, inputs: list[str], overwrite: bool, fail: bool) -> dict | None:
        """The result in the report where all datasets exist, are sound and were written by the job `key`, else None.

        Raises DataError where other files are in their way. fail: skipped documents are an error, also those of an
        earlier call.
        """
        check([*self.datasets, self.report], inputs=inputs, overwrite=True, flag="--output-prefix")
        existing = [file for file in (*self.datasets, self.report) if os.path.lexists(file)]
        killed_while_merging = self._parts_key() == key and self._merge_marker.exists()
        if not existing or overwrite or killed_while_merging:
            return None
        stored = self._read_report()
        if stored.get("key") != key:
            rule = "names files made from other input or with other settings, which only --overwrite replaces"
            if "key" not in stored:
                reason = f"no {self.report} tells what they were made from"
                rule = f"names files that only --overwrite replaces, because {reason}"
            raise DataError(problem("--output-prefix", existing[0], rule, "Add --overwrite, or choose another prefix"))
        if existing == [self.report]:
            return None
        problems = self._dataset_problems(stored)
        skipped = stored["result"]["num_problems"]
        if fail and skipped:
            made = " and ".join(self.prefixes.values())
            problems.append(f"{made} was made without {skipped} unusable documents, which --on-error fail forbids")
        if problems:
            cure = "Add --overwrite to make it again, or choose another prefix."
            raise DataError("\n".join(f"{text}. {cure}" for text in problems))
        return stored["result"] | {"prefixes": self.prefixes}

    def working_folder(self, key: str, notice: Notice) -> pathlib.Path:
        """The folder of parts, emptied where it belongs to another job.

        Raises DataError where it is a folder of something else.
        """
        folder, marker = self.parts, self.parts / "key"
        if os.path.lexists(folder) and self._parts_key() != key:
            foreign = not folder.is_dir() or [name for name in os.listdir(folder) if not name.startswith(".")]
            if not marker.exists() and foreign:
                rule = f"needs the folder {folder} for unfinished parts, but something else is there"
                found = Words("a folder of other files" if folder.is_dir() else "a file")
                raise DataError(problem("--output-prefix", found, rule, "Move it away, or choose another prefix"))
            notice(f"{folder} has parts of another input or other settings; starting anew")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp*"):
            leftover.unlink(missing_ok=True)
        write_text(marker, key)
        return folder

    def remove_parts(self) -> None:
        """Remove the folder of parts, if there is one."""
        if (self.parts / "key").exists():
            shutil.rmtree(self.parts)

    def still_held(self) -> None:
        """LockedError where one of the locks was lost while this process was suspended."""
        for check_lock in self._lock_checks:
            check_lock()

    def begin_merge(self) -> None:
        """Mark that datasets are being put in place: after a kill, the datasets that exist are this job's."""
        self.still_held()
        self._merge_marker.touch()

    def finish(self, key: str, content: dict[str, Any]) -> None:
        """Write the report, last of all: it vouches for the datasets."""
        samples = _samples(self.prefixes.values())
        write_text(self.report, json.dumps({"key": key, "samples": samples, **content}, indent=1) + "\n")

    @property
    def _merge_marker(self) -> pathlib.Path:
        return self.parts / "joining"

    def _parts_key(self) -> str | None:
        try:
            return (self.parts / "key").read_text()
        except OSError:
            return None

    def _read_report(self) -> dict:
        try:
            stored = json.loads(pathlib.Path(self.report).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) and isinstance(stored.get("result"), dict) else {}

    def _dataset_problems(self, stored: dict) -> list[str]:
        """Where the datasets are not as the report says: missing, damaged, or of another job."""
        problems: list[str] = []
        for prefix in self.prefixes.values():
            missing = [file for file in dataset_files([prefix]) if not os.path.isfile(file)]
            try:
                if missing:
                    raise DataError(f"{self.report} says that {' and '.join(missing)} was made, but it is missing")
                dataset, expected = IndexedDataset(prefix), stored["result"]["documents"]
                dataset.verify()
                samples = _samples([prefix])
                recorded = stored.get("samples", samples)
                changed = [name for name, sample in samples.items() if recorded.get(name) != sample]
                found = f"other bytes in {' and '.join(changed)}" if changed else ""
                if dataset.num_documents != expected:
                    found = f"{dataset.num_documents} documents"
                if found:
                    recorded_text = f"{self.report} records {expected} documents and was written with other files"
                    raise DataError(f"{prefix} has {found}, but {recorded_text}")
            except DataError as error:
                problems.append(str(error).rstrip("."))
        return problems


def _samples(prefixes: Iterable[str]) -> dict[str, str]:
    """{name: digest} of the files of datasets; reading all of them would take minutes."""
    return {os.path.basename(file): sampled_digest(file, SAMPLES) for file in dataset_files(prefixes)}
