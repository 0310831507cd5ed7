"""The files of a Megatron checkpoint: a directory as saved, or the zip that a release is downloaded as."""

from __future__ import annotations

import pathlib
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from typing import Any

from megalith.checkpoint.formats.megatron.agreement import without_gap
from megalith.checkpoint.formats.megatron.arguments import known
from megalith.checkpoint.formats.megatron.names import HEADS, TIED, normal_names
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.stored import Window, stored
from megalith.common.errors import CheckpointError, problem

TRACKER = "latest_checkpointed_iteration.txt"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?/(model_optim_rng|model_rng)\.pt")
EXPERT = re.compile(r"mp_rank_\d{2,}_\d{3,}_\d{3,}/model_optim_rng\.pt")
DEPTH = 3  # folders below the one named


@dataclass(frozen=True)
class Files:
    """Files by their names relative to a folder, or in a zip."""

    path: pathlib.Path
    names: tuple[str, ...]
    members: dict[str, tuple[int, int]] | None = None  # of a zip: those that lie there uncompressed
    folder: tempfile.TemporaryDirectory | None = (
        None  # where compressed ones are unpacked; it goes when nobody reads any more
    )

    @classmethod
    def of(cls, path: pathlib.Path) -> Files:
        """Those in a folder (up to DEPTH folders down), in a zip, or the one file."""
        if path.is_dir():
            found = [
                each for depth in range(1, DEPTH + 1) for each in path.glob("/".join("*" * depth)) if each.is_file()
            ]
            return cls(path, tuple(sorted(each.relative_to(path).as_posix() for each in found)))
        if not is_release(path):
            return cls(path.parent, (path.name,))
        window = Window.of(path)
        with window.open() as file, zipfile.ZipFile(file) as archive:
            names = tuple(sorted(info.filename for info in archive.infolist() if not info.is_dir()))
            return cls(path, names, dict(stored(window, file)), tempfile.TemporaryDirectory(prefix="megalith-"))

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

    def below(self, folder: str) -> list[str]:
        """Names in a folder of these files."""
        return [name for name in self.names if name.startswith(folder)]


def is_release(path: pathlib.Path) -> bool:
    """Whether a file is a zip with a Megatron checkpoint inside."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(RANK.search(name) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def layout(path: pathlib.Path) -> str:
    """How many ranks the files at `path` are of, tensor- and pipeline-parallel; '' for one file."""
    found = [match for name in Files.of(path).names if (match := RANK.search(name))]
    tensor, pipeline = len({match[1] for match in found}), len({match[2] for match in found})
    return f"tensor-parallel {tensor}, pipeline-parallel {pipeline}" if found else ""


def find(files: Files, iteration: int | None) -> str:
    """The folder of the checkpoint to read, "" or ending in "/". Raises CheckpointError where there is none of this iteration."""
    folders = sorted(
        {name[: match.start()] for name in files.names if (match := RANK.search(name) or EXPERT.search(name))}
    )
    tracker = next((name for name in files.names if name.rpartition("/")[2] == TRACKER), None)
    if iteration is not None:
        wanted = f"iter_{iteration:07d}/"
    elif tracker is not None:
        word = files.text(tracker)
        wanted = "release/" if word == "release" else f"iter_{int(word):07d}/" if word.isdigit() else ""
        if not wanted:
            raise CheckpointError(
                problem(
                    f"{files.path}/{tracker}",
                    word[:40],
                    "it holds the number of an iteration, or `release`",
                    "Name one: --ckpt-step N",
                )
            )
    elif len(folders) == 1:
        return folders[0]
    else:
        raise CheckpointError(
            problem(
                f"{files.path}",
                folders[:8],
                f"it holds several checkpoints and no {TRACKER} names one",
                "Name one: --ckpt-step N",
            )
        )
    found = [folder for folder in folders if folder.endswith(wanted)]
    if not found:
        raise CheckpointError(
            problem(
                f"{files.path}/{wanted}", [folder or "." for folder in folders][:8], "these are the checkpoints that are there",
                "Name one of them with --ckpt-step N, or copy the missing one",
            )
        )  # fmt: skip
    return found[0]


@dataclass
class Rank:
    """What one model-parallel rank wrote.

    chunks: of each virtual pipeline chunk (one without them) its tensors, {Megatron's name: Lazy}, layers numbered over the
    whole model, in the order of its modules. content: the rest of the file. name: of the file. others: files beside it.
    """

    name: str
    tensor: int
    pipeline: int
    content: dict[str, Any]
    chunks: list[dict[str, Lazy]]
    others: dict[str, Window] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Lazy]:
        """Those of all chunks."""
        return {name: each for chunk in self.chunks for name, each in chunk.items()}


def read_ranks(files: Files, folder: str, classes: set[str]) -> list[Rank]:
    """All ranks of a checkpoint, by pipeline stage and tensor-parallel rank. Raises CheckpointError where one is missing.

    classes: gets the names of the classes that stand-ins stand for.
    """
    names = files.below(folder)
    if any(EXPERT.search(name) for name in names):
        raise CheckpointError(
            problem(
                f"{files.path}/{folder}",
                names[0],
                "expert-parallel ranks are of a mixture of experts",
                "Convert a dense model",
            )
        )
    ranks = []
    for name in names:
        match = RANK.search(name[len(folder) :])
        if match:
            content, found = unpickle.load(files.window(name))
            classes.update(found)
            beside = {
                each.rpartition("/")[2]: files.window(each)
                for each in names
                if each.startswith(name.rpartition("/")[0] + "/") and each != name
            }
            shards = sorted(
                each for each in names if re.fullmatch(re.escape(name.rpartition("/")[0]) + r"_\d{3,}/optim\.pt", each)
            )
            beside |= {f"optim.pt/{place}": files.window(each) for place, each in enumerate(shards)}
            content = content if isinstance(content, dict) else {}
            ranks.append(Rank(name, int(match[1]), int(match[2] or 0), content, chunks_of(content), beside))
    tensor, pipeline = max(rank.tensor for rank in ranks) + 1, max(rank.pipeline for rank in ranks) + 1
    args = known(unpickle.fields(ranks[0].content.get("args")))
    tensor = max(tensor, int(args.get("tensor_model_parallel_size") or args.get("model_parallel_size") or 1))
    pipeline = max(pipeline, int(args.get("pipeline_model_parallel_size") or 1))
    there = {(rank.tensor, rank.pipeline) for rank in ranks}
    missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in there]
    if missing:
        lacking = ", ".join(f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") for t, p in missing[:8])
        raise CheckpointError(
            problem(
                f"{files.path}/{folder}", f"{len(ranks)} of {tensor * pipeline} ranks",
                f"tensor parallel {tensor} x pipeline parallel {pipeline} has one folder for each, and {lacking} is missing",
                "Copy the missing folders",
            )
        )  # fmt: skip
    ranks.sort(key=lambda rank: (rank.pipeline, rank.tensor))
    for one in range(tensor):
        stages = [rank for rank in ranks if rank.tensor == one]
        number_layers(stages)
        empty = [rank.name for rank in stages if not any(".layers." in name for name in rank.tensors)]
        if empty and not args.get(
            "num_layers"
        ):  # a stage may be meant to have none, where the arguments' number of layers is there
            rule = "each of several pipeline stages has some, where no arguments say otherwise"
            raise CheckpointError(problem(f"layers in {empty[0]}", "none", rule, "Copy the checkpoint again, whole"))
    if not args.get("num_layers"):
        _same_counts(ranks)
    return ranks


def _same_counts(ranks: list[Rank]) -> None:
    """Raise CheckpointError where stages have unlike numbers of layers of a stack, as no version without arguments cut a model."""
    for stack in ("encoder", "decoder"):
        layers: dict[int, set[str]] = {}
        for rank in ranks:
            numbers = {name.split(".")[2] for name in rank.tensors if name.startswith(f"{stack}.layers.")}
            layers.setdefault(rank.pipeline, set()).update(numbers)
        counts = {stage: len(numbers) for stage, numbers in layers.items() if numbers}
        if len({*counts.values()}) > 1:
            found = ", ".join(f"{count} in stage {stage}" for stage, count in counts.items())
            rule = "pipeline stages have as many each, where no arguments say otherwise"
            raise CheckpointError(problem(f"layers of the {stack}", found, rule, "Copy the checkpoint again, whole"))


def chunks_of(content: dict[str, Any]) -> list[dict[str, Lazy]]:
    """The model of each virtual pipeline chunk in a rank's file, in the spelling of 2022."""
    keys = sorted((key for key in content if re.fullmatch(r"model\d+", str(key))), key=lambda key: int(key[5:])) or [
        "model"
    ]
    without_gap("virtual pipeline chunks, model0, model1, ...", (int(key[5:]) for key in keys if key != "model"))
    trees = [content.get(key, content.get("module")) for key in keys]
    if trees == [None]:  # a bare state dict
        trees = [content]
    found = []
    for tree in trees:
        flat = flatten(tree)
        names = normal_names(flat)
        chunk = {names[name]: tensor for name, tensor in flat.items()}
        found.append({name: chunk[name] for name in sorted(chunk, key=_module)})
    return found


def is_core(content: dict[str, Any]) -> bool:
    """Whether the model is of Megatron core, whose fused weights have one order in every version."""
    return any(".linear_qkv." in name for name in flatten(content, depth=3))


def _module(name: str) -> int:
    """Megatron makes the last stage's copy of the word embedding after the language model and before the heads."""
    return 2 if name.startswith(tuple(f"{head}." for head in HEADS)) else 1 if name == TIED else 0


def flatten(tree: Any, prefix: str = "", depth: int = 12) -> dict[str, Lazy]:
    """{dotted name: tensor} of nested dicts; what is no tensor is left out, as are the Transformer Engine's notes on itself."""
    found: dict[str, Lazy] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, Lazy) and not str(name).endswith("_extra_state"):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, dict) and depth:
            found |= flatten(value, f"{prefix}{name}.", depth - 1)
    return found


def number_layers(stages: list[Rank]) -> None:
    """Number the layers, which each stage and chunk counts from 0, over the whole model: chunk by chunk, in each stage by stage."""
    first: dict[str, int] = {}
    for index in range(max(len(rank.chunks) for rank in stages)):
        for rank in stages:
            if index >= len(rank.chunks):
                raise CheckpointError(
                    problem(
                        rank.name,
                        f"{len(rank.chunks)} virtual chunks",
                        "another stage has more; each has as many",
                        "Copy it again",
                    )
                )
            chunk, numbers = {}, dict[str, set[int]]()
            for name, tensor in rank.chunks[index].items():
                match = re.match(r"(encoder|decoder)\.layers\.(\d+)\.", name)
                if match:
                    numbers.setdefault(match[1], set()).add(int(match[2]))
                    name = f"{match[1]}.layers.{first.get(match[1], 0) + int(match[2])}.{name[match.end() :]}"
                chunk[name] = tensor
            rank.chunks[index] = chunk
            for stack, found in numbers.items():
                without_gap(f"{rank.name}, layers of the {stack}", found)
                first[stack] = first.get(stack, 0) + len(found)
