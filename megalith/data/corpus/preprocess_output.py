"""What preprocessing writes (datasets, a report, until they are whole a folder of finished parts): whose it is, and whether sound."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.common.files import aside, sampled_digest, sweep, write_text
from megalith.common.locks import locked
from megalith.common.outputs import check
from megalith.data.indexed import IndexedDataset
from megalith.data.indexed.format import dataset_files

SAMPLES = 64  # blocks of 4 KiB of each file that tell whether it is still the one that was made
Notice = Callable[[str], None]


class Output:
    """The files of one `--output-prefix`. prefixes: that of each key's dataset."""

    def __init__(self, prefix: str, prefixes: Mapping[str, str]):
        """Name the files; nothing is touched."""
        self.prefix, self.prefixes = prefix, dict(prefixes)
        self.report = f"{prefix}_preprocess.json"
        self.parts = pathlib.Path(f"{prefix}.parts")
        self.datasets = dataset_files(self.prefixes.values())
        self._held: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def held(self, notice: Notice) -> Iterator[None]:
        """The locks of the prefix and of every dataset (`merge` and others lock those too), without what killed writers left."""
        with contextlib.ExitStack() as locks:
            outputs = (self.prefix, *self.prefixes.values())
            self._held = [locks.enter_context(locked(output, notice=notice)) for output in outputs]
            for file in (*self.prefixes.values(), *self.datasets, self.report):
                sweep(file, notice)
            yield

    def spool(self) -> pathlib.Path:
        """A folder for what comes from streams; `held` removes one that a killed call left."""
        return aside(pathlib.Path(self.report))

    def done(self, key: str, inputs: list[str], overwrite: bool, fail: bool) -> dict | None:
        """The result in the report where all datasets are there, sound and made by the job `key`; None where they are to be made.

        Raises DataError where something else is there. fail: skipped documents are an error, also those of an earlier call.
        """
        check([*self.datasets, self.report], inputs=inputs, overwrite=True, flag="--output-prefix")
        existing = [file for file in (*self.datasets, self.report) if os.path.lexists(file)]
        if (
            not existing or overwrite or (self._key() == key and self._joining.exists())
        ):  # killed while the parts were joined
            return None
        stored = self._stored()
        if stored.get("key") != key:
            rule = "it was made from other input or with other settings, and is not replaced unasked"
            if "key" not in stored:
                rule = f"no {self.report} tells what it was made from, and it is not replaced unasked"
            raise DataError(
                problem("--output-prefix", f"{existing[0]} exists", rule, "Add --overwrite, or choose another prefix")
            )
        if existing == [self.report]:
            return None
        faults = self._faults(stored)
        if fail and stored["result"]["num_problems"]:
            faults.append(
                f"it was made without {stored['result']['num_problems']} unusable documents, which --on-error fail forbids"
            )
        if faults:
            raise DataError(
                "\n".join(f"{fault}. Add --overwrite to make it again, or choose another prefix." for fault in faults)
            )
        return stored["result"] | {"prefixes": self.prefixes}

    def working_folder(self, key: str, notice: Notice) -> pathlib.Path:
        """The folder of parts, emptied of what belongs to another job. DataError where it is a folder of something else."""
        folder, marker = self.parts, self.parts / "key"
        if os.path.lexists(folder) and self._key() != key:
            foreign = not folder.is_dir() or [name for name in os.listdir(folder) if not name.startswith(".")]
            if not marker.exists() and foreign:
                rule = "unfinished work goes there, and this is not from such work"
                raise DataError(
                    problem("--output-prefix", f"{folder} exists", rule, "Move it away, or choose another prefix")
                )
            notice(f"{folder}: left by another input or other settings; starting anew")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp*"):
            leftover.unlink(missing_ok=True)
        write_text(marker, key)
        return folder

    def remove_parts(self) -> None:
        """Remove the folder of parts, if it is one."""
        if (self.parts / "key").exists():
            shutil.rmtree(self.parts)

    def still_held(self) -> None:
        """LockedError where one of the locks was lost while this process was suspended."""
        for check_lock in self._held:
            check_lock()

    def joining(self) -> None:
        """Note that datasets are being put in place: after a kill those that are there are this job's."""
        self.still_held()
        self._joining.touch()

    def finish(self, key: str, content: dict[str, Any]) -> None:
        """Write the report, last of all: it vouches for the datasets."""
        samples = _samples(self.prefixes.values())
        write_text(self.report, json.dumps({"key": key, "samples": samples, **content}, indent=1) + "\n")

    @property
    def _joining(self) -> pathlib.Path:
        return self.parts / "joining"

    def _key(self) -> str | None:
        try:
            return (self.parts / "key").read_text()
        except OSError:
            return None

    def _stored(self) -> dict:
        try:
            stored = json.loads(pathlib.Path(self.report).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) and isinstance(stored.get("result"), dict) else {}

    def _faults(self, stored: dict) -> list[str]:
        """What of the datasets is not as the report says: missing, damaged, or of another job."""
        faults: list[str] = []
        for prefix in self.prefixes.values():
            missing = [file for file in dataset_files([prefix]) if not os.path.isfile(file)]
            try:
                if missing:
                    raise DataError(f"{self.report} says that {' and '.join(missing)} was made, and it is missing")
                made, said = IndexedDataset(prefix), stored["result"]["documents"]
                made.verify()
                samples = _samples([prefix])
                recorded = stored.get("samples", samples)
                changed = [name for name, sample in samples.items() if recorded.get(name) != sample]
                if made.num_documents != said or changed:
                    what = (
                        f"{made.num_documents} documents"
                        if made.num_documents != said
                        else f"other bytes in {' and '.join(changed)}"
                    )
                    raise DataError(
                        f"{prefix}: found {what}; {self.report} tells of {said} documents and was written with other files"
                    )
            except DataError as error:
                faults.append(str(error).rstrip("."))
        return faults


def _samples(prefixes: Iterable[str]) -> dict[str, str]:
    """{name: digest} of the files of datasets; reading all of them would take minutes."""
    return {os.path.basename(file): sampled_digest(file, SAMPLES) for file in dataset_files(prefixes)}
