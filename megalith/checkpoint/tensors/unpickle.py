"""What torch.save wrote, without running what a stranger may have put into it.

    value, classes = load(Window(FILE))    # tensors are Lazy; objects of other people's classes are Stand

A pickle names functions and calls them. Here nothing is imported: the few names that build data are in a table, classes of
other packages (Megatron's enums, APEX's scalers) become inert stand-ins that only remember what they were given, and a name
of the standard library, torch or numpy that is not in the table ends the reading, because nobody needs it to describe data.
"""

from __future__ import annotations

import pathlib
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megalith.checkpoint.tensors.stored import Records, Storage, Window, legacy_records, rebuild, zip_records
from megalith.common.errors import CheckpointError, problem

MAGIC = 0x1950A86A20F9469CFC6C  # first number of a file of torch before 1.6
KNOWN_HERE = {*sys.stdlib_module_names, "__builtin__", "copy_reg", "commands", "exceptions", "torch", "numpy"}


class Stand:
    """Stands in for an object of a class that is not here; it keeps what the object was made of, and does nothing.

    path: "module.Class". args: what it was called with. fields: its state, by name; state: as it was given.
    """

    path = ""

    def __new__(cls, *args: Any, **named: Any) -> Stand:
        made = super().__new__(cls)
        made.args, made.fields = args, dict(named)
        return made

    def __init__(self, *args: Any, **named: Any):
        """Accept anything, as the class it stands for might."""

    args: tuple[Any, ...]
    fields: dict[Any, Any]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.fields.update(part)

    def append(self, item: Any) -> None:
        self.fields.setdefault("items", []).append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.fields[key] = value


class Table(dict):
    """An OrderedDict of the file. torch hangs module versions on it, which nothing here reads."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Known:
    """A function that a pickle may call. A wrapper, so that a pickle cannot change its attributes."""

    __slots__ = ("make",)

    def __init__(self, make: Callable):
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _member(of: Any, name: Any) -> Stand:
    """An enum's member, which Python 3.11 wrote as getattr(Class, name)."""
    if not (isinstance(of, type) and issubclass(of, Stand) and isinstance(name, str)):
        raise _Refused("builtins.getattr")
    return of(name)


def _reconstructor(of: Any, base: Any = None, state: Any = None) -> Any:
    if not (isinstance(of, type) and issubclass(of, Stand)):
        raise _Refused("copyreg._reconstructor")
    return of()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise _Refused(f"_codecs.encode to {encoding}")
    return text.encode(encoding)


def _bytearray(*args: Any) -> bytes:
    if args and not isinstance(args[0], (bytes, str)):
        raise _Refused("bytearray of a number")
    return _encode(*args) if args and isinstance(args[0], str) else bytes(*args)


CALLS: dict[str, Callable] = {
    "collections.OrderedDict": Table,
    "collections.defaultdict": lambda factory=None: Table(),
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": _bytearray,
    "builtins.getattr": _member,
    "copyreg._reconstructor": _reconstructor,
    "_codecs.encode": _encode,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *name: ":".join(str(part) for part in name),
    "torch._utils._rebuild_tensor": rebuild,
    "torch._utils._rebuild_tensor_v2": rebuild,
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, size, stride, grad, hooks, dtype, *rest: rebuild(
        storage, offset, size, stride, dtype=dtype
    ),
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: function(*args),
    "torch.serialization._get_layout": lambda name: name,
}
_PATHS = "PosixPath PurePosixPath Path WindowsPath PureWindowsPath"
_INERT = {  # classes known here of which no more is needed than what they hold
    "builtins": "object int float complex str bool bytes list tuple dict slice range type",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "signal": "Signals",
    "datetime": "datetime date timedelta",
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "numpy": "ndarray dtype",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "torch": "Tensor",
    "torch._tensor": "Tensor",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
    "TensorProperties _MEM_FORMAT_ENCODING StorageMeta",
}
INERT = {f"{module}.{name}" for module, names in _INERT.items() for name in names.split()}
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2


class _Refused(pickle.UnpicklingError):
    """A pickle asked for something that acts."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, records: Records, seen: dict[str, type]):
        super().__init__(file, encoding="latin1")
        self.file, self.records, self.seen = file, records, seen

    def load(self) -> Any:
        """The object, once the numbers that the pickle gives to objects are seen to be those of a pickle."""
        start = self.file.tell()
        for count, (opcode, number, _) in enumerate(pickletools.genops(self.file)):
            if (
                opcode.name.endswith("PUT") and number > count
            ):  # the reader makes a table as long as the largest: gigabytes, of a few bytes
                raise pickle.UnpicklingError(f"it calls an object number {number} where it has {count} at most")
        self.file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        path = f"{RENAMED.get(module, module)}.{name}"
        if path in CALLS:
            return _Known(CALLS[path])
        if module in ("torch", "torch.cuda", "torch.storage"):
            found = getattr(torch, name, None) if "." not in name else None
            if isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
                return found
            if name.endswith("Storage"):
                return Storage.kind(name)
        if path not in INERT and (module.partition(".")[0] in KNOWN_HERE or not module):
            raise _Refused(path)
        return self.seen.setdefault(path, type("Stand", (Stand,), {"path": path}))

    def persistent_load(self, name: Any) -> Storage:
        if not (
            isinstance(name, tuple) and len(name) in (5, 6) and name[0] == "storage" and isinstance(name[1], Storage)
        ):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        return name[1].at(self.records, name[2], name[5] if len(name) == 6 else None)


def load(window: Window, *, plain: bool = False) -> tuple[Any, tuple[str, ...]]:
    """What the file holds, and the names of the classes that stand-ins stand for, sorted. plain: it is one pickle without tensors.

    Raises CheckpointError for a file that is none of torch's, is damaged, or asks for something that acts (which it names).
    """
    seen: dict[str, type] = {}
    try:
        with window.open() as file:
            if plain:
                records = Records(window)
                value = _Unpickler(file, records, seen).load()
            elif zipfile.is_zipfile(file):
                records = zip_records(window, file)
                with window.within(*records.places["data.pkl"]).open() as inner:
                    value = _Unpickler(inner, records, seen).load()
            else:
                records = Records(window)
                value = _legacy(file, records, seen)
        records.check()
    except _Refused as error:
        raise CheckpointError(
            problem(
                str(window), str(error), "a file of weights holds data and has no use for it: loading it elsewhere would run it",
                "Do not trust this file; ask whoever made it for safetensors",
            )
        ) from None  # fmt: skip
    except CheckpointError:
        raise
    except Exception as error:  # a pickle's bytes can make its reader fail in any way
        what = "it is damaged, or not what torch.save writes" if not isinstance(error, OSError) else "it cannot be read"
        raise CheckpointError(
            f"{window}: {what} ({type(error).__name__}: {str(error)[:200]}). Copy it again."
        ) from None
    return value, tuple(sorted(path for path in seen if path not in INERT))


def _legacy(file: Any, records: Records, seen: dict[str, type]) -> Any:
    """The format before torch 1.6: a magic number, a version, facts of the machine, the data, then the storages."""
    file.seek(0)
    read = lambda: _Unpickler(file, records, seen).load()  # noqa: E731
    if read() != MAGIC:
        raise pickle.UnpicklingError("its first number is not torch's")
    read()
    machine = read()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    value = read()
    legacy_records(records, read(), file)
    return value


def fields(value: Any) -> dict[str, Any]:
    """The fields of a Namespace (a stand-in) or a dict; {} of anything else."""
    found = value.fields if isinstance(value, Stand) else value
    return {str(name): each for name, each in found.items()} if isinstance(found, Mapping) else {}


def load_file(path: pathlib.Path) -> tuple[Any, tuple[str, ...]]:
    """`load` of a whole file."""
    return load(Window.of(path))
