"""What torch.save writes is read without running anything; what tries to run is refused and named."""

import argparse
import enum
import io
import os
import pathlib
import pickle
import pickletools
import signal
import sys
import types
import zipfile

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.checkpoint.tensors.stored import Window
from megalith.checkpoint.tensors.unpickle import StandIn, fields, load, load_file
from megalith.common.errors import CheckpointError


def as_zip(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return file.getvalue()


def reading(tmp_path: pathlib.Path, data: bytes):
    path = tmp_path / "hostile.pt"
    path.write_bytes(data)
    return load_file(path)


class Color(enum.Enum):
    RED = 1


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_what_torch_saves(tmp_path: pathlib.Path, new: bool) -> None:
    shared = torch.randn(10)
    tensors = {
        "a": torch.randn(4, 5)[1:, ::2],
        "b": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "c": shared[2:5],
        "d": shared[1:],
        "e": torch.arange(6).view(2, 3).t(),
        "f": torch.tensor(True),
        "g": torch.empty(0, 3),
        "h": torch.tensor(2.5, dtype=torch.float64),
    }
    named = argparse.Namespace(number=1, path=pathlib.Path("/x"), sig=signal.SIGTERM, kinds={1, 2}, dtype=torch.float16)
    content = {
        "tensors": tensors,
        "args": named,
        "more": types.SimpleNamespace(a=[1]),
        "rng": numpy.random.get_state(),
        "raw": b"\xff\x00",
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found, classes = load_file(tmp_path / "x.pt")
    for name, tensor in tensors.items():
        lazy = found["tensors"][name]
        assert (
            lazy.shape == tensor.shape and lazy.dtype == tensor.dtype and torch.equal(lazy.read(), tensor.detach())
        ), name
    args = fields(found["args"])
    assert (
        args["number"] == 1
        and args["kinds"] == {1, 2}
        and args["dtype"] is torch.float16
        and args["path"].args == ("/", "x")
    )
    assert fields(found["more"]) == {"a": [1]} and found["raw"] == b"\xff\x00" and classes == ()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_classes_that_are_not_here_are_stood_in_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    module = types.ModuleType("megatron.model.enums")
    module.Color = Color  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.model", types.ModuleType("megatron.model"))
    monkeypatch.setitem(sys.modules, "megatron.model.enums", module)
    monkeypatch.setattr(Color, "__module__", "megatron.model.enums")
    torch.save({"kind": Color.RED, "scale": torch.ones(1)}, tmp_path / "x.pt", pickle_protocol=protocol)
    monkeypatch.undo()
    found, classes = load_file(tmp_path / "x.pt")
    assert classes == ("megatron.model.enums.Color",) and found["kind"].args == (1,)
    assert isinstance(found["kind"], StandIn) and found["kind"].path == "megatron.model.enums.Color"


def test_enum_members_of_python_3_11(tmp_path: pathlib.Path) -> None:
    """They were written as getattr(Class, name), which with any other argument would be an attack."""
    good = b"cbuiltins\ngetattr\n(cmegatron.enums\nModelType\nX\x03\x00\x00\x00abstR."
    found, classes = reading(tmp_path, as_zip(good))
    assert found.args == ("abs",) and classes == ("megatron.enums.ModelType",)
    bad = b"cbuiltins\ngetattr\n(X\x03\x00\x00\x00absX\x03\x00\x00\x00abstR."
    with pytest.raises(
        CheckpointError,
        match=r"asks for code, which a file of weights has no use for: .*; found 'builtins\.getattr'\. Do not trust",
    ):
        reading(tmp_path, as_zip(bad))


class Call:
    def __init__(self, function, *args):
        self.what = (function, args)

    def __reduce__(self):
        return self.what


HOSTILE = {  # what is called, and what is named
    "os.system": (os.system, ("touch {mark}",), "system"),
    "eval": (eval, ("open({mark!r}, 'w')",), "builtins.eval"),
    "exec": (exec, ("open({mark!r}, 'w')",), "builtins.exec"),
    "__import__": (__import__, ("os",), "builtins.__import__"),
    "open": (open, ("{mark}", "w"), "open"),
    "torch.load": (torch.load, ("{mark}",), "torch.serialization.load"),
    "torch.hub": (torch.hub.load, ("{mark}",), "torch.hub.load"),
    "numpy": (numpy.save, ("{mark}", 1), "numpy.save"),
    "runpy": (__import__("runpy").run_path, ("{mark}",), "runpy.run_path"),
    "subprocess": (__import__("subprocess").check_call, (["touch", "{mark}"],), "subprocess.check_call"),
    "partial": (__import__("functools").partial, (print, 1), "functools.partial"),
    "operator": (__import__("operator").attrgetter, ("system",), "operator.attrgetter"),
    "pickle": (pickle.loads, (b"cos\nsystem\n.",), "_pickle.loads"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_named(tmp_path: pathlib.Path, name: str, protocol: int) -> None:
    function, args, named = HOSTILE[name]
    mark = tmp_path / "it-ran"
    filled = tuple(arg.format(mark=str(mark)) if isinstance(arg, str) else arg for arg in args)
    data = pickle.dumps({"model": {}, "x": Call(function, *filled)}, protocol)
    for form in (as_zip(data), data):
        with pytest.raises(CheckpointError, match=r"hostile.pt") as caught:
            reading(tmp_path, form)
        assert form is data or (
            named.rpartition(".")[2] in str(caught.value) and "Do not trust this file" in str(caught.value)
        )
    assert not mark.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # the classic
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'true'\ntR.",  # a dotted name through a known module
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93(\x8c\x04truetR.",
        b"c\nos\n.",
        b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",  # two gigabytes for nothing
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"ccopyreg\n_reconstructor\n(cbuiltins\nlist\ncbuiltins\nobject\nNtR.",
        b"ccollections\nOrderedDict\n}S'__call__'\nI1\nsb.",  # state for a function
        b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI0\n(I2\nt(I1\nttR.",
        b"\x80\x02r\xff\xff\xff\x7f.",  # a huge memo
        b"(lp0\ng0\na" * 3,
        b"",
        b"\x00" * 40,
    ],
)
def test_broken_and_hostile_pickles_are_errors(tmp_path: pathlib.Path, pickled: bytes) -> None:
    for form in (as_zip(pickled), pickled):
        try:
            found, _ = reading(tmp_path, form)
        except CheckpointError as error:
            assert "hostile.pt" in str(error)
        else:  # builtins.list stands for nothing that acts
            assert isinstance(found, StandIn)


def test_tensors_that_point_elsewhere(tmp_path: pathlib.Path) -> None:
    torch.save({"a": torch.arange(100)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        data = archive.read("x/data.pkl")
        raw = archive.read("x/data/0")
    for old, new in ((b"Kd\x85", b"Kf\x85"), (b"K\x01\x85", b"K\x02\x85")):  # a longer shape, a wider stride
        assert data.count(old)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", data.replace(old, new, 1))
            archive.writestr("x/data/0", raw)
        with pytest.raises(CheckpointError, match=r"hostile.pt is damaged: a tensor points past the end of its data"):
            reading(tmp_path, file.getvalue())
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-600])
    with pytest.raises(CheckpointError, match=r"cut.pt is damaged, or not what torch.save writes"):
        load_file(tmp_path / "cut.pt")


def test_one_tensor_is_read_at_a_time(tmp_path: pathlib.Path) -> None:
    """Also of a file whose tensors all lie in one buffer, as those of a distributed optimizer do."""
    whole = torch.arange(1000.0)
    torch.save([whole[:10], whole[990:]], tmp_path / "x.pt")
    first, last = load_file(tmp_path / "x.pt")[0]
    asked = []
    records = first.read.__closure__
    window = Window.of(tmp_path / "x.pt")
    original = Window.map
    try:
        Window.map = lambda self, start, size: asked.append(size) or original(self, start, size)  # type: ignore[method-assign]
        assert torch.equal(last.read(), whole[990:]) and asked == [40] and records and window.size > 4000
    finally:
        Window.map = original  # type: ignore[method-assign]


OPCODES = [op.code.encode("latin1") for op in pickletools.opcodes]
NAMES = [
    "os\nsystem\n",
    "builtins\neval\n",
    "posix\nsystem\n",
    "megatron\nX\n",
    "torch\nFloatStorage\n",
    "collections\nOrderedDict\n",
    "copyreg\n_reconstructor\n",
]


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"p2000000000\n"])
def test_a_few_bytes_do_not_take_gigabytes(tmp_path, put: bytes) -> None:
    (tmp_path / "bomb.pt").write_bytes(as_zip(b"\x80\x02]" + put + b"."))
    with pytest.raises(CheckpointError, match="it calls an object number 2"):
        load(Window.of(tmp_path / "bomb.pt"))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(OPCODES), st.sampled_from(NAMES).map(lambda n: b"c" + n.encode()), st.binary(max_size=6)
        ),
        max_size=30,
    )
)
def test_no_bytes_do_anything_but_load_or_fail(tmp_path_factory, parts: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    for data in (b"".join(parts) + b".", as_zip(b"".join(parts) + b".")):
        path.write_bytes(data)
        try:
            load(Window.of(path))
        except CheckpointError as error:
            assert "fuzz.pt" in str(error)
