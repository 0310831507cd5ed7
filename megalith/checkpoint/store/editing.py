"""A changed copy of a checkpoint: other names, fewer parts, another iteration, a larger or smaller vocabulary.

Tensors are copied one by one, so the memory needed is that of the largest few, whatever the size of the checkpoint.
"""

from __future__ import annotations

import fnmatch
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from megalith.checkpoint.store.folder import new_folder
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.weights import read_megalith, write
from megalith.common.errors import CheckpointError
from megalith.config.flags.text import nearest

RNG = "rng"  # a part that other programs' checkpoints have: dropping it is allowed, and changes nothing
RESIZABLE = {  # field of the config -> the parameters with a row for each of its units
    "vocab_size": re.compile(r"(.*\.)?(embedding|head)\.(weight|bias)"),
    "max_position_embeddings": re.compile(r"(.*\.)?position_embedding\.weight"),
}


def edit(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    rename: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    iteration: int | None = None,
    vocab_size: int | None = None,
    max_position_embeddings: int | None = None,
    overwrite: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> pathlib.Path:
    """Write a changed copy of the checkpoint at `path` into the new `folder`, and return its path.

    For one process without a process group.

    drop: parts (`optimizer`, `optimizer/exp_avg`) or patterns of whole names (`*/head.weight`) that are left out.
    rename: {old: new} parameter names, or beginnings of them that end before a dot; weights and optimizer alike.
    iteration: the number of the copy, also in its train_state; consumed samples stay what they were.
    vocab_size, max_position_embeddings: the number of rows of the (position) embedding and the head. Rows at the end
        are cut off; new ones are the mean of the old ones, in the optimizer's tensors too, so that a new token starts
        as an average one, with the logit of one. The copy's config has the new size.
    overwrite: replace what an earlier conversion wrote into `folder`.

    Raises LockedError while another process writes there, CheckpointError where `folder` is not empty or something
    named is missing; the source is never changed.
    """
    source = read_megalith(path)
    facts = {name: {"shape": list(lazy.shape)} for name, lazy in source.tensors.items()}
    names = _rename_parameters(_drop_names(facts, drop), rename or {})
    options = {"vocab_size": vocab_size, "max_position_embeddings": max_position_embeddings}
    sizes = {field: size for field, size in options.items() if size is not None}
    rows = _changed_rows(names, facts, sizes)
    tensors = {new: resize(source.tensors[old], rows.get(new)) for new, old in names.items()}
    number = source.iteration if iteration is None else iteration
    changed = replace(source, tensors=tensors, iteration=number, config=source.config.replace(**sizes))
    with new_folder(folder, inputs=[path], overwrite=overwrite, notice=notice) as temporary:
        copy = write(changed, temporary)
    return pathlib.Path(folder) / copy.name


def resize(tensor: Lazy, rows: int | None) -> Lazy:
    """`tensor` with `rows` rows: the last ones cut off, or the mean of all (in float64) added. None: as it is."""
    if rows is None:
        return tensor
    if rows <= tensor.shape[0]:
        return tensor.narrow(0, 0, rows)
    shape = (rows - tensor.shape[0], *tensor.shape[1:])

    def mean() -> Tensor:
        return tensor.read().double().mean(dim=0, keepdim=True).to(tensor.dtype).expand(shape)

    return cat([tensor, Lazy(shape=shape, dtype=tensor.dtype, read=mean)])


def _drop_names(known: dict[str, dict], drop: Sequence[str]) -> list[str]:
    """The names that no pattern drops; each pattern must drop something."""
    kept = list(known)
    for pattern in (each for each in drop if each != RNG):
        left = [
            name
            for name in kept
            if not (fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/"))
        ]
        if len(left) == len(kept):
            raise CheckpointError(_unknown("drop", pattern, [*known, *{name.rpartition("/")[0] for name in known}]))
        kept = left
    return kept


def _rename_parameters(names: list[str], rename: Mapping[str, str]) -> dict[str, str]:
    """{new name: old name}; each old name must be there, and no two may become one."""
    renamed = {name: name for name in names}  # old -> new
    for old, new in rename.items():
        beginning = re.compile(rf"(.*/){re.escape(old)}(?=\.|$)")
        touched = [name for name in renamed if beginning.match(name)]
        if not touched:
            raise CheckpointError(_unknown("rename", old, {name.rpartition("/")[2] for name in names}))
        renamed |= {name: beginning.sub(rf"\g<1>{new}", name) for name in touched}
    swapped = {new: old for old, new in renamed.items()}
    if len(swapped) < len(renamed):
        duplicate = next(new for new in renamed.values() if list(renamed.values()).count(new) > 1)
        raise CheckpointError(
            f"rename would give two tensors the name {duplicate}. Drop one of them, or choose another name."
        )
    return swapped


def _changed_rows(names: dict[str, str], facts: dict[str, dict], sizes: Mapping[str, int]) -> dict[str, int]:
    """{new name: rows} of the parameters that change size, and of the optimizer's tensors with as many rows."""
    rows: dict[str, int] = {}
    for field, size in sizes.items():
        tables = {
            name: facts[old]["shape"]
            for name, old in names.items()
            if RESIZABLE[field].fullmatch(name.rpartition("/")[2])
        }
        before = next((shape[0] for name, shape in tables.items() if name.startswith("model/")), None)
        if before is None:
            raise CheckpointError(
                f"{field} cannot be set to {size}: the checkpoint has no parameter with a row for each unit of it"
            )
        if size < 1:
            raise CheckpointError(f"{field} must be at least 1; found {size}. The checkpoint has {before}.")
        rows |= {name: size for name, shape in tables.items() if shape and shape[0] == before}
    return rows


def _unknown(option: str, name: str, known: Sequence[str] | set[str]) -> str:
    near = nearest(name, known)
    return f"{option}: the checkpoint has nothing called {name!r}" + (f"; did you mean {near!r}?" if near else ".")
