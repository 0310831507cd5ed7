"""Conversions need the memory of a layer and an embedding, not of the model.

A rank that begins with another program's weights needs that of its part and a layer, and reads no more than its part.
All is measured in a separate process, path by path.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # half a minute of one process
ALLOWED = 8e6  # bytes beside tensors: objects, buffers of files, what malloc keeps
PATHS = {  # name: (source, target, format, options)
    "Hugging Face": ("ours", "hf", "huggingface", {}),
    "Hugging Face in bfloat16": ("ours", "hf16", "huggingface", {"dtype": "bfloat16"}),
    "pytorch_model.bin": ("ours", "bin", "huggingface", {"safetensors": False}),
    "Megatron": ("ours", "megatron", "megatron", {}),
    "Megatron, tp2 pp2": (
        "ours",
        "tp2pp2",
        "megatron",
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ),
    "reshape": ("tp2pp2", "tp4", "megatron", {"tensor_model_parallel_size": 4}),
    "from Hugging Face": ("hf", "a", "megalith", {}),
    "from Hugging Face to bfloat16": ("hf", "b", "megalith", {"dtype": "bfloat16"}),
    "from pytorch_model.bin": ("bin", "c", "megalith", {}),
    "from Megatron": ("megatron", "d", "megalith", {}),
    "from Megatron, tp2 pp2": ("tp2pp2", "e", "megalith", {}),
    "from Megatron, tp2 pp2 to bfloat16": ("tp2pp2", "f", "megalith", {"dtype": "bfloat16"}),
    "from Megatron, tp2 pp2, copies averaged": ("tp2pp2", "i", "megalith", {"replicas": "average"}),
    "from torch_dist": ("torch_dist", "g", "megalith", {}),
    "from DeepSpeed": ("deepspeed", "h", "megalith", {}),
}


def child(folder: pathlib.Path) -> None:
    """All paths in turn; prints {name: bytes of memory that is no file's}, and of the model and its bound."""
    import torch

    from megalith.checkpoint.formats import read
    from megalith.checkpoint.tensors.lazy import Lazy
    from megalith.checkpoint.weights import Weights, write
    from megalith.config.parameters import parameter_shapes
    from megalith.config.run import RunConfig
    from megalith.workflows.conversion import convert

    config = RunConfig().replace(
        num_layers=24, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4, vocab_size=16300,
        max_position_embeddings=64, position_embedding_type="rope", normalization="RMSNorm", swiglu=True,
        add_bias_linear=False, untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    shapes = parameter_shapes(config.model)
    tensors = {
        f"model/{name}": Lazy(shape=shape, dtype=torch.float32, read=lambda shape=shape: torch.randn(shape))
        for name, shape in shapes.items()
    }
    write(Weights(config=config, tensors=tensors), folder / "ours")
    size = {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}
    found = {
        "total": sum(size.values()),
        "bound": size["embedding.weight"] + sum(each for name, each in size.items() if name.startswith("layers.0.")),
    }
    for name, (source, target, to, options) in PATHS.items():
        if not (folder / source).exists():
            {"torch_dist": make_torch_dist, "deepspeed": make_deepspeed}[source](folder)
        read(folder / source)  # so that what is imported for it is there
        with Peak() as peak:
            convert(folder / source, folder / target, to=to, options=options)
        found[name] = peak.bytes
    found |= {"ranks": ranks(folder, config)}
    print(json.dumps(found))


RANKS = (0, 3)  # a tensor-parallel rank of the first stage and the other one of the last
PARTS = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
SOURCES = {
    "Hugging Face": "hf", "pytorch_model.bin": "bin", "Megatron": "megatron", "Megatron, tp2 pp2": "tp2pp2",
    "torch_dist": "torch_dist", "DeepSpeed": "deepspeed", "a run": "ours",
}  # fmt: skip


def ranks(folder: pathlib.Path, config) -> dict[str, dict]:
    """{source and rank of tp2 pp2: bytes: {"memory": of loading, "part": of the rank's weights, "read": of files}}."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megalith.checkpoint.formats import read
    from megalith.parallel.mesh import build_mesh
    from megalith.runtime.build import build_runtime

    taken, found = [0], {}
    count(taken)
    for rank in RANKS:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        parts = config.replace(**PARTS, device="cpu", micro_batch_size=1, global_batch_size=1, seq_length=64)
        mesh = build_mesh(parts.parallel, torch.device("cpu"))
        part = sum(parameter.to_local().nbytes for _, parameter in build_runtime(parts, mesh).named_parameters())
        for name, source in SOURCES.items():
            weights = read(folder / source, options=dict(replicas="first"))
            taken[0] = 0
            with Peak() as peak:
                placed = build_runtime(parts, mesh, weights=weights)
            found[f"{name}, rank {rank}"] = {"memory": peak.bytes, "part": part, "read": taken[0]}
            del placed
        dist.destroy_process_group()
    return found


def count(taken: list[int]) -> None:
    """Add to `taken` the bytes of every part of a file that is read from now on."""
    import dataclasses

    from megalith.checkpoint.formats.huggingface import files as huggingface_files
    from megalith.checkpoint.tensors import stored
    from megalith.checkpoint.tensors.lazy import Lazy

    def counted(**fields) -> Lazy:
        lazy = Lazy(**fields)

        def read(index=()):
            part = lazy.part(index) if index else lazy.read()
            taken[0] += part.nbytes
            return part

        return dataclasses.replace(lazy, read=read, box=read)

    original = huggingface_files._open_safetensors
    stored.Lazy = counted
    huggingface_files._open_safetensors = lambda file: ((name, counted(**vars(lazy))) for name, lazy in original(file))


class Peak:
    """The most memory in a block, beyond what there was, that no file backs; asked for every half millisecond."""

    def __enter__(self) -> "Peak":
        import gc
        import threading

        gc.collect()
        self.before = self.highest = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()
        self.bytes = self.highest - self.before

    def watch(self) -> None:
        while not self.done.wait(0.0005):
            self.highest = max(self.highest, self.now())

    @staticmethod
    def now() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])


CORE = {
    "self_attention.query_key_value": "self_attention.linear_qkv", "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1", "mlp.dense_4h_to_h": "mlp.linear_fc2", "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}  # fmt: skip


def make_torch_dist(folder: pathlib.Path) -> None:
    """The layers of each kind in one tensor, as Megatron core has them."""
    import torch
    import torch.distributed.checkpoint as dcp

    content = torch.load(next((folder / "megatron").rglob("*.pt")), weights_only=False)
    model, target = content["model"]["language_model"], folder / "torch_dist"
    encoder = model["encoder"]
    state = {
        f"decoder.layers.{core}.weight": torch.stack([encoder[f"layers.{i}.{name}.weight"] for i in range(24)])
        for name, core in CORE.items()
    }
    state |= {
        "embedding.word_embeddings.weight": model["embedding"]["word_embeddings"]["weight"],
        "output_layer.weight": model["output_layer"]["weight"],
        "decoder.final_layernorm.weight": encoder["final_layernorm.weight"],
    }
    target.mkdir()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(target), no_dist=True)
    (target / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    torch.save({"args": content["args"], "iteration": 7}, target / "common.pt")


def make_deepspeed(folder: pathlib.Path) -> None:
    """The files of a tensor-parallel model under other names."""
    import torch

    target = folder / "deepspeed"
    target.mkdir()
    for rank in range(4):
        content = torch.load(next((folder / "tp4").rglob(f"mp_rank_{rank:02d}/*.pt")), weights_only=False)
        torch.save({"module": content.pop("model"), **content}, target / f"mp_rank_{rank:02d}_model_states.pt")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, int]:
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("reads /proc, which only Linux has")
    folder = str(tmp_path_factory.mktemp("memory"))
    code = f"import pathlib, tests.checkpoint.test_memory as m; m.child(pathlib.Path({folder!r}))"
    # With a fixed threshold freed memory is returned at once, and does not count for the next path.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "32768", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_model_is_many_times_what_is_allowed(peaks) -> None:
    assert peaks["total"] > 4 * (peaks["bound"] + ALLOWED)


@pytest.mark.parametrize("name", PATHS)
def test_a_layer_and_the_embedding_at_most(peaks, name: str) -> None:
    assert peaks[name] < peaks["bound"] + ALLOWED, (
        f"{peaks[name] / 1e6:.1f} MB; a layer and the embedding are {peaks['bound'] / 1e6:.1f}"
    )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_rank_reads_its_part(peaks, source: str, rank: int) -> None:
    """In tp2 pp2: the memory of the rank's part and a layer; of the files only its part."""
    found = peaks["ranks"][f"{source}, rank {rank}"]
    assert found["memory"] < found["part"] + peaks["bound"] / 2 + ALLOWED, (
        f"{found['memory'] / 1e6:.1f} of {found['part'] / 1e6:.1f} MB"
    )
    assert 0.9 * found["part"] < found["read"] <= found["part"], (
        f"{found['read'] / 1e6:.1f} of {found['part'] / 1e6:.1f} MB"
    )
    assert found["part"] < 0.3 * peaks["total"]
