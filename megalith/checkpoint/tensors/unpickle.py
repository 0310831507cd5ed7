"""Read what torch.save wrote, without running code that a file may contain.

    value, classes = load(Window(FILE))    # tensors are Lazy; objects of other packages' classes are StandIn

A pickle names functions and calls them. Here nothing is imported: the few names that build data are in a table, classes
of other packages (Megatron's enums, APEX's scalers) become inert stand-ins that only keep their arguments, and a name
of the standard library, torch or numpy that is not in the table ends the reading, because data does not need it.
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
GUARDED_MODULES = {*sys.stdlib_module_names, "__builtin__", "copy_reg", "commands", "exceptions", "torch", "numpy"}


class StandIn:
    """Stands in for an object of a class that is not imported; it keeps what the object was made of, and does nothing.

    path: "module.Class". args: what it was called with. fields: its state, by name; state: the same as in the pickle.
    """

    path = ""

    def __new__(cls, *args: Any, **named: Any) -> StandIn:
        stand_in = super().__new__(cls)
        stand_in.args, stand_in.fields = args, dict(named)
        return stand_in

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


class InertDict(dict):
    """An OrderedDict of the file. torch stores module versions as its attributes, which nothing here reads."""

    def __setstate__(self, state: Any) -> None:
        pass


class _AllowedCall:
    """A function that a pickle may call. A wrapper, so that a pickle cannot change its attributes."""

    __slots__ = ("make",)

    def __init__(self, make: Callable):
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _enum_member(of: Any, name: Any) -> StandIn:
    """An enum's member, which Python 3.11 wrote as getattr(Class, name)."""
    if not (isinstance(of, type) and issubclass(of, StandIn) and isinstance(name, str)):
        raise _Refused("builtins.getattr")
    return of(name)


def _reconstructor(of: Any, base: Any = None, state: Any = None) -> Any:
    if not (isinstance(of, type) and issubclass(of, StandIn)):
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


ALLOWED_CALLS: dict[str, Callable] = {
    "collections.OrderedDict": InertDict,
    "collections.defaultdict": lambda factory=None: InertDict(),
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": _bytearray,
    "builtins.getattr": _enum_member,
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
_INERT = {  # classes of the guarded modules that only hold data: they become stand-ins too
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
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING StorageMeta",
}
INERT = {f"{module}.{name}" for module, names in _INERT.items() for name in names.split()}
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2


class _Refused(pickle.UnpicklingError):
    """A pickle asked for a function that does more than build data."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, records: Records, stand_ins: dict[str, type]):
        super().__init__(file, encoding="latin1")
        self.file, self.records, self.stand_ins = file, records, stand_ins

    def load(self) -> Any:
        """The object, after a check of the numbers that the pickle gives to objects in its memo."""
        start = self.file.tell()
        for count, (opcode, number, _) in enumerate(pickletools.genops(self.file)):
            # Python makes a table as long as the largest number: a few bytes could take gigabytes.
            if opcode.name.endswith("PUT") and number > count:
                raise pickle.UnpicklingError(f"it calls an object number {number} where it has {count} at most")
        self.file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        path = f"{RENAMED.get(module, module)}.{name}"
        if path in ALLOWED_CALLS:
            return _AllowedCall(ALLOWED_CALLS[path])
        if module in ("torch", "torch.cuda", "torch.storage"):
            found = getattr(torch, name, None) if "." not in name else None
            if isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
                return found
            if name.endswith("Storage"):
                return Storage.of_class(name)
        if path not in INERT and (module.partition(".")[0] in GUARDED_MODULES or not module):
            raise _Refused(path)
        return self.stand_ins.setdefault(path, type("StandIn", (StandIn,), {"path": path}))

    def persistent_load(self, name: Any) -> Storage:
        if not (
            isinstance(name, tuple) and len(name) in (5, 6) and name[0] == "storage" and isinstance(name[1], Storage)
        ):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        return name[1].at(self.records, name[2], name[5] if len(name) == 6 else None)


def load(window: Window, *, bare_pickle: bool = False) -> tuple[Any, tuple[str, ...]]:
    """What the file holds, and the names of the classes that stand-ins replace, sorted.

    bare_pickle: the file is one pickle, without tensors. Raises CheckpointError for a file that torch did not write,
    that is damaged, or that asks for code (which the message names).
    """
    stand_ins: dict[str, type] = {}
    try:
        with window.open() as file:
            if bare_pickle:
                records = Records(window)
                value = _Unpickler(file, records, stand_ins).load()
            elif zipfile.is_zipfile(file):
                records = zip_records(window, file)
                with window.within(*records.locations["data.pkl"]).open() as inner:
                    value = _Unpickler(inner, records, stand_ins).load()
            else:
                records = Records(window)
                value = _legacy(file, records, stand_ins)
        records.check()
    except _Refused as error:
        rule = "asks for code, which a file of weights has no use for: loading it elsewhere would run it"
        cure = "Do not trust this file; ask whoever made it for safetensors"
        raise CheckpointError(problem(str(window), str(error), rule, cure)) from None
    except CheckpointError:
        raise
    except Exception as error:  # a pickle's bytes can make its reader fail in any way
        fault = "cannot be read" if isinstance(error, OSError) else "is damaged, or not what torch.save writes"
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{window} {fault} ({reason}). Copy it again.") from None
    return value, tuple(sorted(path for path in stand_ins if path not in INERT))


def _legacy(file: Any, records: Records, stand_ins: dict[str, type]) -> Any:
    """The format before torch 1.6: a magic number, a version, facts of the machine, the data, then the storages."""
    file.seek(0)
    read = lambda: _Unpickler(file, records, stand_ins).load()  # noqa: E731
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
    found = value.fields if isinstance(value, StandIn) else value
    return {str(name): item for name, item in found.items()} if isinstance(found, Mapping) else {}


def load_file(path: pathlib.Path) -> tuple[Any, tuple[str, ...]]:
    """`load` of a whole file."""
    return load(Window.of(path))
