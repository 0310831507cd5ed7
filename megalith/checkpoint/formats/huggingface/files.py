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
from megalith.checkpoint.tensors.torch_file import Placeholder
from megalith.checkpoint.tensors.unpickle import load_file
from megalith.common.errors import CheckpointError, problem
from megalith.common.files import atomic_path, write_text
from megalith.config.flags.text import Words

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in transformers' order of preference
INDEX = ".index.json"
WEIGHTS_PATTERN = re.compile(r".*\.(safetensors|bin|pth|h5|msgpack|gguf|ot|ckpt)|.*\.(safetensors|bin)\.index\.json")
# Files of a trainer's state, which are no weights.
TRAINER_PATTERN = re.compile(r"(training_args|optimizer|scheduler|scaler|random_states|rng_state)\b.*")
ADAPTER = "adapter_config.json"
DTYPES = {  # safetensors' name -> torch's
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def weight_files(folder: pathlib.Path, named: str | None = None) -> list[pathlib.Path]:
    """The files with tensors that transformers reads.

    It prefers safetensors to torch's files, and a single file to the shards of an index.
    named: the file or index that config.json names (`transformers_weights`). Raises CheckpointError where there are
    none, where one that the index names is missing, or where the weights are an adapter's, which change another's.
    """
    chosen = _weight_file(folder, named)
    if not chosen.name.endswith(INDEX):
        return [chosen]
    files = [folder / each for each in sorted(set(weight_map(chosen).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        rule = f"must have all {len(files)} files that {chosen.name} names"
        found = Words(f"no {', '.join(missing)}" if missing else "none named there")
        raise CheckpointError(problem(f"{folder}", found, rule, "Copy or download these files as well"))
    return files


def _weight_file(folder: pathlib.Path, named: str | None) -> pathlib.Path:
    """The single file, or the index of shards, that transformers reads."""
    if (folder / ADAPTER).exists():
        rule = (
            "must be a whole model's: an adapter's change those of another model, and transformers applies them when "
            "it reads this folder"
        )
        cure = (
            "Merge them (merge_and_unload() in peft) and convert what it saves; to convert without the adapter, move "
            f"{ADAPTER} elsewhere"
        )
        raise CheckpointError(problem(f"{folder}: weights", ADAPTER, rule, cure))
    if named is not None:
        if pathlib.PurePath(named).name != named or not (folder / named).is_file():
            rule = "must name the file in this folder that has the weights"
            cure = "Copy it as well, or correct config.json"
            raise CheckpointError(problem(f"{folder / 'config.json'}: transformers_weights", named, rule, cure))
        return folder / named
    for name in WEIGHT_FILES:
        for each in (folder / name, folder / f"{name}{INDEX}"):
            if each.is_file():
                return each
    there = sorted(each.name for each in folder.iterdir())
    others = [name for name in there if WEIGHTS_PATTERN.fullmatch(name) and not TRAINER_PATTERN.fullmatch(name)]
    cure = "Copy or download them as well"
    if variants := [name for name in others if re.fullmatch(r"(model|pytorch_model)\..+", name)]:
        cure = (
            f"Rename {variants[0]} to one of these if it holds the weights you mean; transformers too reads it only if "
            "its variant is named"
        )
    rule = f"must have {WEIGHT_FILES[0]} or {WEIGHT_FILES[1]}, or shards with an index"
    raise CheckpointError(problem(f"{folder}, a Hugging Face folder,", (others or there)[:12], rule, cure))


def weight_map(index: pathlib.Path) -> dict[str, str]:
    """{tensor: file} of an index. Raises CheckpointError where it has none."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(each, str) and each for each in table.values()):
        rule = "must map names of tensors to names of files"
        raise CheckpointError(problem(f"{index}: weight_map", str(table)[:80], rule, "Copy or download it again"))
    return table


def read_tensors(folder: pathlib.Path, named: str | None = None) -> tuple[dict[str, Lazy], list[str]]:
    """{Hugging Face's name: Lazy} of a folder, and notes.

    There is a note of other files of weights in the folder, and of differences between an index and its files.
    Raises CheckpointError as weight_files does, and where two of the files have different tensors of one name.
    """
    files, notes = weight_files(folder, named), list[str]()
    chosen = _weight_file(folder, named)
    read = {each.name for each in files} | {chosen.name}
    there = sorted(each.name for each in folder.iterdir() if each.name not in read)
    others = [name for name in there if WEIGHTS_PATTERN.fullmatch(name) and not TRAINER_PATTERN.fullmatch(name)]
    if others:
        notes.append(
            f"weights are read from {chosen.name}, as transformers does, and not from {', '.join(others)} beside it"
        )
    indexed = weight_map(chosen) if chosen.name.endswith(INDEX) else {}
    found, file_of = dict[str, Lazy](), dict[str, str]()
    for file in files:
        for name, tensor in open_tensors([file]).items():
            if name in found and not equal_tensors(found[name], tensor):
                rule = f"must have one value ({chosen.name} says that it is in {indexed.get(name)})"
                different = Words(f"different ones in {file_of[name]} and {file.name}")
                cure = "Copy all shards again, of one version"
                raise CheckpointError(problem(f"{folder}: tensor {name}", different, rule, cure))
            found[name], file_of[name] = tensor, file.name
    if wrong := sorted(name for name, file in indexed.items() if file_of.get(name, file) != file):
        first = wrong[0]
        notes.append(
            f"{chosen.name} says {indexed[first]} has {first}; it is read from {file_of[first]}, where it is"
            + f" (so too {len(wrong) - 1} more)" * (len(wrong) > 1)
        )
    for text, names in (
        (f"{chosen.name} names tensors that its files do not have", indexed.keys() - found.keys()),
        (
            f"tensors that {chosen.name} does not name, read from its files as transformers does",
            found.keys() - indexed.keys() if indexed else set(),
        ),
    ):
        if names:
            notes.append(f"{text}: {', '.join(sorted(names)[:8])}{' ...' * (len(names) > 8)}")
    return found, notes


def equal_tensors(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors have the same elements, compared a block at a time; on meta they have none."""
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and all(a.is_meta or b.is_meta or torch.equal(a, b) for a, b in zip(blocks(one), blocks(other)))


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cure = "Copy or download it again"
        raise CheckpointError(problem(str(file), Words(str(error)), "must be readable JSON", cure)) from None
    if not isinstance(found, dict):
        found_type = type(found).__name__
        raise CheckpointError(problem(str(file), found_type, "must be a JSON object", "Copy or download it again"))
    return found


def open_tensors(files: list[pathlib.Path]) -> dict[str, Lazy]:
    """{Hugging Face's name: Lazy} of all files; nothing but headers is read."""
    found: dict[str, Lazy] = {}
    for file in files:
        found |= dict(_open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file))
    return found


def _open_safetensors(file: pathlib.Path) -> Iterator[tuple[str, Lazy]]:
    def read(name: str, index: Index = ()) -> Tensor:
        # Opened again for each tensor: the pages of a memory map count as the process's memory until it is closed.
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(name)[index] if index else opened.get_tensor(name)

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                dtype = getattr(torch, DTYPES[part.get_dtype()])
                read_this = functools.partial(read, name)
                yield name, Lazy(shape=tuple(part.get_shape()), dtype=dtype, read=read_this, box=read_this)
    except (SafetensorError, OSError, KeyError) as error:
        cure = "Copy or download it again; compare its size and checksum with the original's"
        raise CheckpointError(problem(str(file), Words(str(error)), "must be a safetensors file", cure)) from None


def _open_pickle(file: pathlib.Path) -> Iterator[tuple[str, Lazy]]:
    state, _ = load_file(file)
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(tensor, Lazy):
            yield name, tensor


def write_tensors(folder: pathlib.Path, tensors: Mapping[str, Lazy], max_shard_size: int, safetensors: bool) -> None:
    """Write tensors into files of at most max_shard_size bytes, and an index where there are several.

    One tensor at a time is in memory.
    """
    shards = split_into_shards(tensors, max_shard_size)
    stem, dot, ending = WEIGHT_FILES[0 if safetensors else 1].rpartition(".")
    table: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"{stem}{dot}{ending}" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}{dot}{ending}"
        with atomic_path(folder / name) as temporary:
            if safetensors:
                _write_safetensors(temporary, {each: tensors[each] for each in names})
            else:
                shard = {each: tensors[each] for each in names}
                torch_file.save(
                    temporary,
                    {each: Placeholder(lazy.shape, lazy.dtype, ((0, lazy.read),)) for each, lazy in shard.items()},
                )
        table |= dict.fromkeys(names, name)
    if len(shards) > 1:
        total_size = sum(map(nbytes, tensors.values()))
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(table.items()))}
        write_text(folder / f"{stem}{dot}{ending}.index.json", json.dumps(index, indent=2) + "\n")


def _write_safetensors(file: pathlib.Path, tensors: Mapping[str, Lazy]) -> None:
    """Write header and tensors one after another (https://github.com/huggingface/safetensors#format).

    The library's own writer needs all tensors in memory at once.
    """
    names = {getattr(torch, dtype): name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda each: (-tensors[each].dtype.itemsize, each))  # wide dtypes first aligns all
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in order:
        lazy = tensors[each]
        start, end = end, end + nbytes(lazy)
        header[each] = {"dtype": names[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for each in order:
            stream.write(tensors[each].read().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def nbytes(lazy: Lazy) -> int:
    """Bytes of a tensor."""
    return torch.Size(lazy.shape).numel() * lazy.dtype.itemsize


def split_into_shards(tensors: Mapping[str, Lazy], max_shard_size: int) -> list[list[str]]:
    """Names, in order, in as few shards as their sizes allow; a tensor over the limit has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, lazy in tensors.items():
        if shards[-1] and size + nbytes(lazy) > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(lazy)
    return shards
