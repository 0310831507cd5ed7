"""The files that hold the tensors of a Hugging Face folder: safetensors or pytorch_model.bin, in shards or not."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalith.checkpoint.tensors import torch_file
from megalith.checkpoint.tensors.lazy import Index, Lazy, blocks
from megalith.checkpoint.tensors.torch_file import Room
from megalith.checkpoint.tensors.unpickle import load_file
from megalith.common.errors import CheckpointError, problem
from megalith.common.files import atomic_path, write_text

NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for
INDEX = ".index.json"
WEIGHTS = re.compile(r".*\.(safetensors|bin|pth|h5|msgpack|gguf|ot|ckpt)|.*\.(safetensors|bin)\.index\.json")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|random_states|rng_state)\b.*")  # a trainer's own
ADAPTER = "adapter_config.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
          "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # fmt: skip


def weight_files(folder: pathlib.Path, named: str | None = None) -> list[pathlib.Path]:
    """The files with tensors that transformers reads: of safetensors, then of torch, the single file before the shards of an index.

    named: the file or index that config.json names (`transformers_weights`). Raises CheckpointError where there are none, where one
    that the index names is missing, or where the weights are those of an adapter, which change another model's.
    """
    chosen = _chosen(folder, named)
    if not chosen.name.endswith(INDEX):
        return [chosen]
    files = [folder / each for each in sorted(set(weight_map(chosen).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        rule = f"{chosen.name} names {len(files)} files and all are needed"
        raise CheckpointError(
            problem(f"{folder}: missing shards", missing, rule, "Copy or download these files as well")
        )
    return files


def _chosen(folder: pathlib.Path, named: str | None) -> pathlib.Path:
    """The single file, or the index of shards, that transformers reads."""
    if (folder / ADAPTER).exists():
        rule = "an adapter's weights change those of another model, and transformers applies them when it reads this folder"
        cure = f"Merge them (merge_and_unload() in peft) and convert what it saves; without the adapter, move {ADAPTER} elsewhere"
        raise CheckpointError(problem(f"{folder}: weights", ADAPTER, rule, cure))
    if named is not None:
        if pathlib.PurePath(named).name != named or not (folder / named).is_file():
            rule = "config.json names under transformers_weights the file in its folder that has the weights"
            raise CheckpointError(
                problem(f"{folder}: transformers_weights", named, rule, "Copy it as well, or correct config.json")
            )
        return folder / named
    for name in NAMES:
        for each in (folder / name, folder / f"{name}{INDEX}"):
            if each.is_file():
                return each
    there = sorted(each.name for each in folder.iterdir())
    others = [name for name in there if WEIGHTS.fullmatch(name) and not NO_WEIGHTS.fullmatch(name)]
    cure = "Copy or download them as well"
    if variants := [name for name in others if re.fullmatch(r"(model|pytorch_model)\..+", name)]:
        cure = f"Give {variants[0]} that name where it is what you mean; transformers too reads it only if its variant is named"
    rule = f"a Hugging Face folder has {NAMES[0]} or {NAMES[1]}, or shards with an index"
    raise CheckpointError(problem(f"{folder}: weights", (others or there)[:12], rule, cure))


def weight_map(index: pathlib.Path) -> dict[str, str]:
    """{tensor: file} of an index. Raises CheckpointError where it has none."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(each, str) and each for each in table.values()):
        rule = "it maps names of tensors to names of files"
        raise CheckpointError(problem(f"{index}: weight_map", str(table)[:80], rule, "Copy or download it again"))
    return table


def read_tensors(folder: pathlib.Path, named: str | None = None) -> tuple[dict[str, Lazy], list[str]]:
    """{their name: Lazy} of a folder, and what to tell: other files of weights in it, and where an index and its files differ.

    Raises CheckpointError as weight_files, and where one name has different tensors in two of the files.
    """
    taken, notes = weight_files(folder, named), list[str]()
    chosen = _chosen(folder, named)
    names = {each.name for each in taken} | {chosen.name}
    others = sorted(e.name for e in folder.iterdir() if WEIGHTS.fullmatch(e.name) and not NO_WEIGHTS.fullmatch(e.name))
    if left := [name for name in others if name not in names]:
        notes.append(
            f"weights are read from {chosen.name}, as transformers does, and not from {', '.join(left)} beside it"
        )
    said = weight_map(chosen) if chosen.name.endswith(INDEX) else {}
    found, places = dict[str, Lazy](), dict[str, str]()
    for file in taken:
        for name, tensor in tensors([file]).items():
            if name in found and not same(found[name], tensor):
                rule = f"one tensor has one value, and {chosen.name} says that it is in {said.get(name)}"
                cure = "Copy all shards again, of one version"
                raise CheckpointError(
                    problem(f"{folder}: {name}", f"{places[name]} and {file.name} that differ in it", rule, cure)
                )
            found[name], places[name] = tensor, file.name
    if wrong := sorted(name for name, file in said.items() if places.get(name, file) != file):
        notes.append(f"{chosen.name} says {said[wrong[0]]} has {wrong[0]}; it is read from {places[wrong[0]]}, where it is"
                     + f" (so too {len(wrong) - 1} more)" * (len(wrong) > 1))  # fmt: skip
    for text, names_ in ((f"{chosen.name} names tensors that its files do not have", said.keys() - found.keys()),
                         (f"tensors that {chosen.name} does not name, read from its files as transformers does",
                          found.keys() - said.keys() if said else set())):  # fmt: skip
        if names_:
            notes.append(f"{text}: {', '.join(sorted(names_)[:8])}{' ...' * (len(names_) > 8)}")
    return found, notes


def same(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors have the same elements, compared a block at a time."""
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and all(map(torch.equal, blocks(one), blocks(other)))


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            problem(str(file), str(error), "it must be readable JSON", "Copy or download it again")
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(
            problem(str(file), type(found).__name__, "it must be a JSON object", "Copy or download it again")
        )
    return found


def tensors(files: list[pathlib.Path]) -> dict[str, Lazy]:
    """{their name: Lazy} of all files; nothing but headers is read."""
    found: dict[str, Lazy] = {}
    for file in files:
        found |= dict(_safetensors(file) if file.suffix == ".safetensors" else _pickled(file))
    return found


def _safetensors(file: pathlib.Path) -> Iterator[tuple[str, Lazy]]:
    def read(name: str, index: Index = ()) -> Tensor:
        # Opened anew for each tensor: pages of a map that stays open count as memory of the process until it is closed.
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(name)[index] if index else opened.get_tensor(name)

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                dtype = getattr(torch, DTYPES[part.get_dtype()])
                one = functools.partial(read, name)
                yield name, Lazy(shape=tuple(part.get_shape()), dtype=dtype, read=one, box=one)
    except (SafetensorError, OSError, KeyError) as error:
        cure = "Copy or download it again; compare its size and checksum with the original's"
        raise CheckpointError(problem(str(file), str(error), "it must be a safetensors file", cure)) from None


def _pickled(file: pathlib.Path) -> Iterator[tuple[str, Lazy]]:
    state, _ = load_file(file)
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(tensor, Lazy):
            yield name, tensor


def write_tensors(folder: pathlib.Path, made: Mapping[str, Lazy], max_shard_size: int, safetensors: bool) -> None:
    """Write tensors into files of at most max_shard_size bytes, and the index where there are several.

    Memory is that of one tensor.
    """
    shards = split(made, max_shard_size)
    stem, dot, ending = NAMES[0 if safetensors else 1].rpartition(".")
    table: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"{stem}{dot}{ending}" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}{dot}{ending}"
        with atomic_path(folder / name) as temporary:
            if safetensors:
                _write_safetensors(temporary, {each: made[each] for each in names})
            else:
                rooms = {each: Room(made[each].shape, made[each].dtype, ((0, made[each].read),)) for each in names}
                torch_file.save(temporary, rooms)
        table |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(nbytes, made.values()))}, "weight_map": dict(sorted(table.items()))}
        write_text(folder / f"{stem}{dot}{ending}.index.json", json.dumps(index, indent=2) + "\n")


def _write_safetensors(file: pathlib.Path, made: Mapping[str, Lazy]) -> None:
    """Header and tensors, one after another (https://github.com/huggingface/safetensors#format); the library wants all at once."""
    names = {getattr(torch, dtype): name for name, dtype in DTYPES.items()}
    order = sorted(made, key=lambda each: (-made[each].dtype.itemsize, each))  # wide ones first: so all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in order:
        start, end = end, end + nbytes(made[each])
        header[each] = {"dtype": names[made[each].dtype], "shape": list(made[each].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for each in order:
            stream.write(made[each].read().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def nbytes(lazy: Lazy) -> int:
    """Bytes of a tensor."""
    return torch.Size(lazy.shape).numel() * lazy.dtype.itemsize


def split(made: Mapping[str, Lazy], max_shard_size: int) -> list[list[str]]:
    """Names, in order, in as few runs as their sizes allow; a tensor over the limit has a file of its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, lazy in made.items():
        if shards[-1] and held + nbytes(lazy) > max_shard_size:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes(lazy)
    return shards
