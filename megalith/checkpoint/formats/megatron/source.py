"""The files of a Megatron checkpoint: a directory as saved, or the zip that a release is downloaded as."""

from __future__ import annotations

import pathlib
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from typing import Any

from megalith.checkpoint.formats.megatron.agreement import check_consecutive
from megalith.checkpoint.formats.megatron.arguments import check_arguments
from megalith.checkpoint.formats.megatron.names import HEADS, TIED_EMBEDDING, normalize_names
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.stored import Window, uncompressed_members
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?/(model_optim_rng|model_rng)\.pt")
EXPERT_FILE = re.compile(r"mp_rank_\d{2,}_\d{3,}_\d{3,}/model_optim_rng\.pt")
MAX_DEPTH = 3  # levels of folders below the source


@dataclass(frozen=True)
class CheckpointFiles:
    """Files by their names relative to a folder, or in a zip.

    members: offset and size of the files that a zip holds uncompressed; None for a folder. folder: where compressed
    files are unpacked; it is deleted when no Window refers to it any more.
    """

    path: pathlib.Path
    names: tuple[str, ...]
    members: dict[str, tuple[int, int]] | None = None
    folder: tempfile.TemporaryDirectory | None = None

    @classmethod
    def of(cls, path: pathlib.Path) -> CheckpointFiles:
        """The files in a folder (up to MAX_DEPTH levels down), in a zip, or the single file."""
        if path.is_dir():
            patterns = ("/".join("*" * depth) for depth in range(1, MAX_DEPTH + 1))
            found = [file for pattern in patterns for file in path.glob(pattern) if file.is_file()]
            return cls(path, tuple(sorted(file.relative_to(path).as_posix() for file in found)))
        if not is_release(path):
            return cls(path.parent, (path.name,))
        window = Window.of(path)
        with window.open() as file, zipfile.ZipFile(file) as archive:
            names = tuple(sorted(info.filename for info in archive.infolist() if not info.is_dir()))
            members = dict(uncompressed_members(window, file))
            return cls(path, names, members, tempfile.TemporaryDirectory(prefix="megalith-"))

    def window(self, name: str) -> Window:
        """The bytes of a file."""
        if self.members is None:
            return Window.of(self.path / name)
        if name in self.members:
            inner = Window.of(self.path).within(*self.members[name])
            return Window(inner.path, inner.start, inner.size, f"{self.path}: {name}")
        target = pathlib.Path(self.folder.name) / name.replace("/", "_")  # type: ignore[union-attr]
        if not target.exists():
            with zipfile.ZipFile(self.path) as archive, archive.open(name) as packed, open(target, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        return Window(target, 0, target.stat().st_size, f"{self.path}: {name}", self.folder)

    def text(self, name: str) -> str:
        """The text of a small file."""
        window = self.window(name)
        return bytes(window.read(0, min(window.size, 1000)).numpy()).decode("utf-8", "replace").strip()

    def in_folder(self, folder: str) -> list[str]:
        """Names in a folder of these files."""
        return [name for name in self.names if name.startswith(folder)]


def is_release(path: pathlib.Path) -> bool:
    """Whether a file is a zip with a Megatron checkpoint inside."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(RANK_FILE.search(name) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def describe_layout(path: pathlib.Path) -> str:
    """The numbers of tensor- and pipeline-parallel ranks that wrote the files at `path`; '' for one file."""
    found = [match for name in CheckpointFiles.of(path).names if (match := RANK_FILE.search(name))]
    tensor, pipeline = len({match[1] for match in found}), len({match[2] for match in found})
    return f"tensor-parallel {tensor}, pipeline-parallel {pipeline}" if found else ""


def find(files: CheckpointFiles, iteration: int | None) -> str:
    """The folder of the checkpoint to read, "" or ending in "/".

    Raises CheckpointError where there is no checkpoint of this iteration.
    """
    folders = sorted(
        {name[: match.start()] for name in files.names if (match := RANK_FILE.search(name) or EXPERT_FILE.search(name))}
    )
    tracker = next((name for name in files.names if name.rpartition("/")[2] == TRACKER), None)
    if iteration is not None:
        wanted = f"iter_{iteration:07d}/"
    elif tracker is not None:
        text = files.text(tracker)
        wanted = "release/" if text == "release" else f"iter_{int(text):07d}/" if text.isdigit() else ""
        if not wanted:
            rule = "must hold the number of an iteration, or `release`"
            raise CheckpointError(problem(f"{files.path}/{tracker}", text[:40], rule, "Name one: --ckpt-step N"))
    elif len(folders) == 1:
        return folders[0]
    else:
        rule = f"holds several checkpoints, and no {TRACKER} names one"
        raise CheckpointError(problem(f"{files.path}", folders[:8], rule, "Name one: --ckpt-step N"))
    found = [folder for folder in folders if folder.endswith(wanted)]
    if not found:
        present = Words(f"the checkpoints {[folder or '.' for folder in folders][:8]}")
        cure = "Name one of them with --ckpt-step N, or copy the missing one"
        raise CheckpointError(problem(f"{files.path}/{wanted}", present, "does not exist", cure))
    return found[0]


@dataclass
class RankFile:
    """What one model-parallel rank saved.

    name: of the file. chunks: the tensors of each virtual pipeline chunk (one chunk without virtual stages),
    {Megatron's name: Lazy}, in the order of its modules, with layers numbered over the whole model. content: the rest
    of the file. other_files: those in the same folder.
    """

    name: str
    tensor_rank: int
    pipeline_rank: int
    content: dict[str, Any]
    chunks: list[dict[str, Lazy]]
    other_files: dict[str, Window] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Lazy]:
        """The tensors of all chunks."""
        return {name: each for chunk in self.chunks for name, each in chunk.items()}


def read_ranks(files: CheckpointFiles, folder: str, classes: set[str]) -> list[RankFile]:
    """All ranks of a checkpoint, by pipeline stage and tensor-parallel rank.

    classes: gets the names of the pickled classes that are replaced by stand-ins. Raises CheckpointError where a rank
    is missing.
    """
    names = files.in_folder(folder)
    if any(EXPERT_FILE.search(name) for name in names):
        rule = "must have no expert-parallel ranks, which belong to a mixture of experts"
        raise CheckpointError(problem(f"{files.path}/{folder}", names[0], rule, "Convert a dense model"))
    ranks = []
    for name in names:
        match = RANK_FILE.search(name[len(folder) :])
        if match:
            content, found = unpickle.load(files.window(name))
            classes.update(found)
            rank_folder = name.rpartition("/")[0]
            other_files = {
                other.rpartition("/")[2]: files.window(other)
                for other in names
                if other.startswith(rank_folder + "/") and other != name
            }
            optimizer_file = re.compile(re.escape(rank_folder) + r"_\d{3,}/optim\.pt")
            shards = sorted(other for other in names if optimizer_file.fullmatch(other))
            other_files |= {f"optim.pt/{number}": files.window(other) for number, other in enumerate(shards)}
            content = content if isinstance(content, dict) else {}
            ranks.append(RankFile(name, int(match[1]), int(match[2] or 0), content, model_chunks(content), other_files))
    tensor, pipeline = max(rank.tensor_rank for rank in ranks) + 1, max(rank.pipeline_rank for rank in ranks) + 1
    args = check_arguments(unpickle.fields(ranks[0].content.get("args")))
    tensor = max(tensor, int(args.get("tensor_model_parallel_size") or args.get("model_parallel_size") or 1))
    pipeline = max(pipeline, int(args.get("pipeline_model_parallel_size") or 1))
    present = {(rank.tensor_rank, rank.pipeline_rank) for rank in ranks}
    missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in present]
    if missing:
        folders = ", ".join(f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") for t, p in missing[:8])
        rule = (
            f"must hold one folder for each rank of tensor parallel {tensor} x pipeline parallel {pipeline}, "
            f"but {folders} {'are' if len(missing) > 1 else 'is'} missing"
        )
        present_ranks = Words(f"{len(ranks)} of {tensor * pipeline} ranks")
        raise CheckpointError(problem(f"{files.path}/{folder}", present_ranks, rule, "Copy the missing folders"))
    ranks.sort(key=lambda rank: (rank.pipeline_rank, rank.tensor_rank))
    for tensor_rank in range(tensor):
        stages = [rank for rank in ranks if rank.tensor_rank == tensor_rank]
        renumber_layers(stages)
        empty = [rank.name for rank in stages if not any(".layers." in name for name in rank.tensors)]
        if empty and not args.get("num_layers"):  # with num_layers the number of layers is known, and is checked later
            rule = "must hold layers, as each of several pipeline stages does where no arguments say otherwise"
            raise CheckpointError(problem(empty[0], Words("none"), rule, "Copy the complete checkpoint again"))
    if not args.get("num_layers"):
        _check_equal_stages(ranks)
    return ranks


def _check_equal_stages(ranks: list[RankFile]) -> None:
    """Raise CheckpointError where stages have different numbers of layers of a stack.

    No version that saved no arguments split a model in that way.
    """
    for stack in ("encoder", "decoder"):
        layers: dict[int, set[str]] = {}
        for rank in ranks:
            numbers = {name.split(".")[2] for name in rank.tensors if name.startswith(f"{stack}.layers.")}
            layers.setdefault(rank.pipeline_rank, set()).update(numbers)
        counts = {stage: len(numbers) for stage, numbers in layers.items() if numbers}
        if len({*counts.values()}) > 1:
            found = Words(", ".join(f"{count} in stage {stage}" for stage, count in counts.items()))
            what = f"the number of layers of the {stack}"
            rule = "must be the same in every pipeline stage, where no arguments say otherwise"
            raise CheckpointError(problem(what, found, rule, "Copy the complete checkpoint again"))


def model_chunks(content: dict[str, Any]) -> list[dict[str, Lazy]]:
    """The tensors of each virtual pipeline chunk in a rank's file, with names in the spelling of 2022."""
    numbered = sorted((key for key in content if re.fullmatch(r"model\d+", str(key))), key=lambda key: int(key[5:]))
    check_consecutive("the virtual pipeline chunks (model0, model1, ...)", (int(key[5:]) for key in numbered))
    keys = numbered or ["model"]
    trees = [content.get(key, content.get("module")) for key in keys]
    if trees == [None]:  # a bare state dict
        trees = [content]
    found = []
    for tree in trees:
        flat = flatten(tree)
        names = normalize_names(flat)
        chunk = {names[name]: tensor for name, tensor in flat.items()}
        found.append({name: chunk[name] for name in sorted(chunk, key=_module_order)})
    return found


def is_megatron_core(content: dict[str, Any]) -> bool:
    """Whether the model is of Megatron core, whose fused weights have one order in every version."""
    return any(".linear_qkv." in name for name in flatten(content, depth=3))


def _module_order(name: str) -> int:
    """Megatron creates the last stage's copy of the word embedding after the language model and before the heads."""
    return 2 if name.startswith(tuple(f"{head}." for head in HEADS)) else 1 if name == TIED_EMBEDDING else 0


def flatten(tree: Any, prefix: str = "", depth: int = 12) -> dict[str, Lazy]:
    """{dotted name: tensor} of nested dicts, without other values and without Transformer Engine's _extra_state."""
    found: dict[str, Lazy] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, Lazy) and not str(name).endswith("_extra_state"):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, dict) and depth:
            found |= flatten(value, f"{prefix}{name}.", depth - 1)
    return found


def renumber_layers(stages: list[RankFile]) -> None:
    """Number the layers, which each stage and chunk counts from 0, over the whole model.

    The order is chunk by chunk, and within a chunk stage by stage.
    """
    first: dict[str, int] = {}
    for index in range(max(len(rank.chunks) for rank in stages)):
        for rank in stages:
            if index >= len(rank.chunks):
                rule = "must have as many virtual pipeline chunks as the other stages, which have more"
                raise CheckpointError(problem(rank.name, len(rank.chunks), rule, "Copy it again"))
            chunk, numbers = {}, dict[str, set[int]]()
            for name, tensor in rank.chunks[index].items():
                match = re.match(r"(encoder|decoder)\.layers\.(\d+)\.", name)
                if match:
                    numbers.setdefault(match[1], set()).add(int(match[2]))
                    name = f"{match[1]}.layers.{first.get(match[1], 0) + int(match[2])}.{name[match.end() :]}"
                chunk[name] = tensor
            rank.chunks[index] = chunk
            for stack, found in numbers.items():
                check_consecutive(f"the layers of the {stack} in {rank.name}", found)
                first[stack] = first.get(stack, 0) + len(found)
