"""Megatron's file of block embeddings: a pickle of {"embed_data": {number of the block: float16 [p]}}.

It is read by the restricted reader of checkpoint/tensors/unpickle.py, which runs nothing that a file may contain.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.stored import Window
from megalith.common.errors import DataError, problem
from megalith.common.files import sha256
from megalith.common.locks import locked
from megalith.config.flags.text import Words
from megalith.retrieval import store

FORMATS = {"f2": np.float16, "f4": np.float32, "f8": np.float64}


def import_pickle(path: str | os.PathLike, folder: str | os.PathLike, shard_rows: int = 65536) -> store.Plan:
    """Make a store of such a file, its rows in the order of their numbers.

    Memory: the whole file, as a pickle cannot be read in parts. Raises CheckpointError for a file that asks for code
    or is damaged, DataError for one that holds something else.
    """
    path = pathlib.Path(path)
    value, _ = unpickle.load(Window.of(path), bare_pickle=True)
    data = value.get("embed_data") if isinstance(value, dict) else None
    if not isinstance(data, dict) or not data or not all(isinstance(number, int) for number in data):
        rule = 'must be a pickle of {"embed_data": {number: vector}}, as Megatron writes'
        raise DataError(problem(str(path), Words(f"a {type(value).__name__}"), rule, "Name another file"))
    numbers = sorted(data)
    width = len(array_of(data[numbers[0]], path))
    source = {"kind": "megatron", "path": os.path.abspath(path), "sha256": sha256(path)}
    plan = store.Plan(len(numbers), width, shard_rows, ("id",), source)
    with locked(folder, inside=True):
        for shard in store.begin(folder, plan):
            here = numbers[plan.range_of(shard).start : plan.range_of(shard).stop]
            vectors = [array_of(data[number], path) for number in here]
            if wrong := [number for number, vector in zip(here, vectors) if vector.shape != (width,)]:
                rule = f"must have {width} elements, as the first"
                found = Words(f"{np.shape(array_of(data[wrong[0]], path))} for block {wrong[0]}")
                raise DataError(problem(f"Vectors of {path}", found, rule, "Make the file again"))
            store.write_shard(folder, shard, np.stack(vectors), np.array(here, np.int64)[:, None])
    return plan


def array_of(value: Any, path: pathlib.Path) -> np.ndarray:
    """The numpy array that a stand-in was made of: a state of (version, shape, dtype, whether by columns, bytes)."""
    try:
        _, shape, dtype, by_columns, data = value.state
        kind, order = dtype.args[0], dtype.state[1]
        array = np.frombuffer(data, np.dtype(FORMATS[kind]).newbyteorder(">" if order == ">" else "<"))
        return array.reshape(shape, order="F" if by_columns else "C")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        rule = f"must be arrays of numpy of {', '.join(FORMATS)}"
        found = Words(getattr(value, "path", type(value).__name__))
        raise DataError(problem(f"Vectors of {path}", found, rule, "Make the file again")) from None
