"""A folder of embeddings: shards of numpy arrays, mapped into memory, and JSON beside them. No pickle.

    store.json            what was embedded, by which model, and how: written first, compared when work is resumed
    00003.vectors.npy     float16 [rows of the shard, p]: the vectors
    00003.rows.npy        int64 [rows of the shard, columns]: which text each vector is of (sources.py)
    00003.json            the shard's facts and checksums: written last, so that a shard with it is complete
    faiss-NAME.index      an approximate index of all of it (search.py), and its checksum in faiss-NAME.json

Every shard but the last has as many rows, and a row's place does not depend on how many processes wrote. The shards are
the parts of data/array_folder.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.files import sha256
from megalith.config.flags.text import Words
from megalith.data import array_folder

VERSION = 1
DESCRIPTION, ARRAYS = "store.json", ("vectors", "rows")
BUILD_AGAIN = "Build it again, or name another folder"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a store holds, known before the first vector is computed.

    rows, width: number of vectors and elements of each. shard_rows: rows of a shard. columns: names of what `rows`
    has of each. source: what the texts are of, see sources.py. model: the checkpoint. probe: what that makes of a
    short text, by which another model is noticed. settings: what else decides on the values.
    """

    rows: int
    width: int
    shard_rows: int
    columns: tuple[str, ...]
    source: Mapping[str, Any]
    model: str = ""
    probe: tuple[float, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def command(self) -> str:
        """The command that builds such a store."""
        return "megalith retro index" if self.source.get("kind") == "retro" else "megalith index build"

    def range_of(self, shard: int) -> range:
        """Rows of a shard."""
        return range(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))


def begin(
    folder: str | os.PathLike, plan: Plan, check: bool = False, notice: Callable[[str], None] = lambda line: None
) -> list[int]:  # fmt: skip
    """Write store.json, or compare it where work is resumed; the shards that are still to be written.

    check: also those that are damaged, after a notice; all bytes are read. The lock of the folder must be held. Raises
    DataError where the folder holds anything else, or a store of another plan; nothing is replaced.
    """
    folder = pathlib.Path(folder)
    if (folder / DESCRIPTION).exists():
        check_same(folder, read_plan(folder), plan)
    else:
        description = {"version": VERSION, **dataclasses.asdict(plan)}
        array_folder.write_description(folder / DESCRIPTION, description, "Name another --output")
    if check:
        array_folder.forget_damaged(folder, plan.shards, ARRAYS, notice)
    return array_folder.missing(folder, plan.shards)


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a store of which every shard was finished."""
    folder = pathlib.Path(folder)
    return (folder / DESCRIPTION).exists() and not array_folder.missing(folder, read_plan(folder).shards)


def check_same(folder: pathlib.Path, then: Plan, now: Plan) -> None:
    """Raise DataError that names what is not as it was when the folder was begun."""
    old, new = (dataclasses.asdict(plan) for plan in (then, now))
    if not same_probe(old.pop("probe"), new.pop("probe")):
        raise DataError(another_model(str(folder), now.model))
    del new["model"]  # a checkpoint may have moved; the probe says whether it is another one
    array_folder.check_same(folder, old, new, "Give the same, or another --output")


def same_probe(then: Sequence[float], now: Sequence[float]) -> bool:
    """Whether two probes are of one model, in whatever format it computed."""
    return len(then) == len(now) and np.allclose(then, now, rtol=5e-2, atol=5e-2 * float(np.abs(then).max(initial=0)))


def another_model(folder: str, model: str) -> str:
    """The message on a model that did not make a store."""
    rule = f"must be the model that made {folder}: it makes another vector of the same text"
    return problem("--load", model, rule, "Name that model, or build an index of this one")


def check_probe(store: Store, probe: Sequence[float], model: str) -> None:
    """Raise DataError where a model did not make a store that says what its model makes of a text."""
    if store.plan.probe and not same_probe(store.plan.probe, probe):
        raise DataError(another_model(str(store.folder), model))


def write_shard(folder: str | os.PathLike, shard: int, vectors: np.ndarray, rows: np.ndarray) -> None:
    """Write a complete shard. vectors [n, p] in any format, stored as float16; rows: int64 [n, columns].

    Raises DataError for vectors that float16 cannot hold.
    """
    with np.errstate(over="ignore"):  # it is found below
        stored = vectors.astype(np.float16)
    if not np.isfinite(stored).all():
        row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
        rule, largest = "must be finite numbers below 65504, as float16 holds", float(np.abs(vectors[row]).max())
        cure = "Train with --retriever-score-scaling or a smaller --lr, whose vectors are smaller"
        raise DataError(problem(f"Vectors of shard {shard}", Words(f"{largest:g} in row {row}"), rule, cure))
    array_folder.write_part(folder, shard, {"vectors": stored, "rows": rows.astype(np.int64)}, rows=len(stored))


def read_plan(folder: str | os.PathLike) -> Plan:
    """The plan in store.json. Raises DataError where there is none, or it cannot be read."""
    path = pathlib.Path(folder) / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("version")
        plan = Plan(**content | {name: tuple(content[name]) for name in ("columns", "probe")})
        sound = version == VERSION and min(plan.rows, plan.width, plan.shard_rows) > 0
    except FileNotFoundError:
        rule = f"must be the folder of a store ({DESCRIPTION})"
        raise DataError(problem("The index", str(folder), rule, "Build one with megalith index build")) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). {BUILD_AGAIN}.") from None
    if not sound:
        rule = f"must be of version {VERSION}, with rows and a width above 0"
        raise DataError(problem(str(path), Words(f"version {version}, {plan.rows} rows"), rule, BUILD_AGAIN))
    return plan


class Store:
    """A complete store, read through memory maps."""

    def __init__(self, folder: str | os.PathLike):
        """Raises DataError where shards are missing, or a file has not the size of its rows."""
        self.folder, self.plan = pathlib.Path(folder), read_plan(folder)
        array_folder.check_complete(folder, self.plan.shards, "shards", self.plan.command)
        shards = range(self.plan.shards)
        self._vectors = [self._open(shard, "vectors", np.float16, self.plan.width) for shard in shards]
        self._rows = [self._open(shard, "rows", np.int64, len(self.plan.columns)) for shard in shards]

    def _open(self, shard: int, kind: str, dtype: type, columns: int) -> np.ndarray:
        shape = (len(self.plan.range_of(shard)), columns)
        return array_folder.open_array(self.folder, shard, kind, dtype, shape, DESCRIPTION)

    def __len__(self) -> int:
        """Number of vectors."""
        return self.plan.rows

    @property
    def width(self) -> int:
        """Elements of a vector."""
        return self.plan.width

    @property
    def model(self) -> str:
        """The path of the model that made it. Raises ConfigError where that is not known."""
        if not self.plan.model:
            rule = f"must be named, as {self.folder} does not say which model made it"
            raise ConfigError(problem("--load", None, rule, "Write --load RUN"))
        return self.plan.model

    def check_source(self, source: Mapping[str, Any]) -> None:
        """Raise DataError where the vectors are of other texts than these."""
        cure = f"Give the flags of {self.plan.command}, or build another store"
        array_folder.check_same(self.folder, self.plan.source, source, cure)

    @property
    def digest(self) -> str:
        """What distinguishes this store from others: of store.json, and of the checksums of all shards."""
        files = [self.folder / DESCRIPTION, *(self.folder / f"{shard:05d}.json" for shard in range(self.plan.shards))]
        return array_folder.digest(files)

    def chunks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float16 [n, p]) over all vectors, at most `rows` at a time, which are read when touched."""
        for shard, vectors in enumerate(self._vectors):
            for first in range(0, len(vectors), rows):
                yield shard * self.plan.shard_rows + first, vectors[first : first + rows]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, p] of these rows."""
        rows = np.asarray(rows, np.int64)
        found, shards = np.empty((len(rows), self.width), np.float32), rows // self.plan.shard_rows
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._vectors[shard][rows[here] - shard * self.plan.shard_rows]
        return found

    def row(self, number: int) -> dict[str, int]:
        """Which text vector `number` is of, by the names of the plan's columns."""
        shard, place = divmod(int(number), self.plan.shard_rows)
        return dict(zip(self.plan.columns, self._rows[shard][place].tolist()))


def verify(folder: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it), after all bytes were read; nothing for an undamaged store."""
    for _, name, what in array_folder.damaged(folder, read_plan(folder).shards, ARRAYS):
        yield name, what
    for path in sorted(pathlib.Path(folder).glob("faiss-*.index")):
        if (found := faiss_damage(path)) is not None:
            yield path.name, found


def faiss_digest(path: pathlib.Path) -> str:
    """What distinguishes the file of an approximate index from others."""
    return sha256(path)[:16]


def faiss_damage(path: pathlib.Path) -> str | None:
    """What is wrong with the file of an approximate index, after all bytes were read; None where nothing is.

    One without a checksum is taken as it is: it was built before there were any, or its building was killed at the end.
    """
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"has a checksum that cannot be read ({type(error).__name__}: {error})"
    return None if found == sha256(path) else "has another checksum than when it was written"
