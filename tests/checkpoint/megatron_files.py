"""Megatron directories made by hand, row by row, in every version and layout, without the tables of the importer."""

from __future__ import annotations

import argparse
import functools
import pathlib
import shutil
import sys
import types
import zipfile

import torch
from torch import Tensor

from megalith.config.sections.model import ModelConfig

Tensors = dict[str, Tensor]
SMALL = dict(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    max_position_embeddings=16,
    vocab_size=96,
    bias_gelu_fusion=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def model_of(**changes) -> tuple[ModelConfig, Tensors]:
    """A config, and random weights under our names, biases and norms among them."""
    config = ModelConfig(**(SMALL | changes))
    torch.manual_seed(1)
    model = config.architecture.find("model")(config)
    return config, {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}


def fused_qkv(
    q: Tensor, k: Tensor, v: Tensor, config: ModelConfig, ranks: int, rank: int, version: float | str
) -> Tensor:
    """The rows of query_key_value that a rank holds, one after another."""
    n, g, d = config.num_attention_heads // ranks, config.num_kv_heads // ranks, config.head_dim
    heads, groups = range(rank * n, rank * n + n), range(rank * g, rank * g + g)
    each = (
        [q[head * d + c] for head in heads for c in range(d)],
        *([x[group * d + c] for group in groups for c in range(d)] for x in (k, v)),
    )
    rows = []
    if version in (0.0, "thirds"):
        rows = [row for part in each for row in part]
    elif version == 1.0:
        rows = [part[head * d + c] for head in range(n) for c in range(d) for part in each]
    else:
        for group in range(g):
            heads_per_group = n // g
            rows += (
                each[0][group * heads_per_group * d : (group + 1) * heads_per_group * d]
                + each[1][group * d : group * d + d]
                + each[2][group * d : group * d + d]
            )
    return torch.stack(rows)


def layer_tensors(
    tensors: Tensors,
    number: int,
    config: ModelConfig,
    ranks: int,
    rank: int,
    version,
    spelling: dict[str, str],
    gate_first: bool,
) -> Tensors:
    """One layer of one rank, in Megatron's names."""
    of_layer = {
        name.removeprefix(f"layers.{number}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"layers.{number}.")
    }
    attention, norm = spelling["attention"], spelling["norm"]
    found: Tensors = {}
    for kind in ("weight", "bias"):

        def put(name: str, tensor: Tensor | None) -> None:
            if tensor is not None:
                found[f"{name}.{kind}"] = tensor.clone()  # noqa: B023

        def cut(tensor: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if tensor is None else tensor.chunk(ranks, dim)[rank]

        put(f"input_{norm}", of_layer.get(f"attention_norm.{kind}"))
        put(f"post_attention_{norm}", of_layer.get(f"mlp_norm.{kind}"))
        q, k, v = (of_layer.get(f"attention.{name}.{kind}") for name in "qkv")
        if q is not None and k is not None and v is not None:
            if config.attention_head_type == "multiquery":
                put(f"{attention}.query", cut(q))
                put(f"{attention}.key_value", torch.cat([k, v]))
            else:
                put(f"{attention}.query_key_value", fused_qkv(q, k, v, config, ranks, rank, version))
        put(
            f"{attention}.dense",
            cut(of_layer[f"attention.out.{kind}"], 1) if kind == "weight" else of_layer.get("attention.out.bias"),
        )
        up, gate = cut(of_layer.get(f"mlp.up.{kind}")), cut(of_layer.get(f"mlp.gate.{kind}"))
        if gate is not None and up is not None:
            up = torch.cat([gate, up] if gate_first else [up, gate])
        put("mlp.dense_h_to_4h", up)
        put(
            "mlp.dense_4h_to_h",
            cut(of_layer[f"mlp.down.{kind}"], 1) if kind == "weight" else of_layer.get("mlp.down.bias"),
        )
    return {f"layers.{{}}.{name}": tensor for name, tensor in sorted(found.items())}


SPELLINGS = {
    2019: {"stack": "transformer", "attention": "attention", "norm": "layernorm"},
    2022: {"stack": "encoder", "attention": "self_attention", "norm": "layernorm"},
    2023: {"stack": "encoder", "attention": "self_attention", "norm": "norm"},
}


def write(
    folder: pathlib.Path, config: ModelConfig, tensors: Tensors, *, tensor: int = 1, pipeline: int = 1,
    virtual: int = 1, version: float | str = 3.0,
    year: int = 2022, padded: int = 128, gate_first: bool = True, args: dict | None = None,
    iteration: int | None = 7, extra: dict | None = None,
) -> pathlib.Path:  # fmt: skip
    """A Megatron directory of this model."""
    spelling, size = SPELLINGS[year], config.num_layers // pipeline // virtual
    target = folder / (f"iter_{iteration:07d}" if iteration else "release")
    for stage in range(pipeline):
        for rank in range(tensor):
            content: dict = {"iteration": iteration or 0}
            if version != 0.0:
                content["checkpoint_version"] = 3.0 if version == "thirds" else version
            if args is not None:
                content["args"] = namespace(config, tensor, pipeline, padded, args)
            for chunk in range(virtual):
                last = stage == pipeline - 1 and chunk == virtual - 1
                stack: Tensors = {}
                for local in range(size):
                    number = (chunk * pipeline + stage) * size + local
                    part = layer_tensors(tensors, number, config, tensor, rank, version, spelling, gate_first)
                    stack |= {name.format(local): each for name, each in part.items()}
                words = torch.cat(
                    [tensors["embedding.weight"], torch.full((padded - config.vocab_size, config.hidden_size), 9.0)]
                ).chunk(tensor)[rank]
                language: dict = {}
                if stage == chunk == 0:
                    language["embedding"] = {"word_embeddings": {"weight": words}}
                    if "token_type_embedding.weight" in tensors:
                        language["embedding"]["tokentype_embeddings"] = {
                            "weight": tensors["token_type_embedding.weight"]
                        }
                    if "position_embedding.weight" in tensors:
                        language["embedding"]["position_embeddings"] = {"weight": tensors["position_embedding.weight"]}
                if last:
                    stack |= {
                        f"final_{spelling['norm']}.{kind}": tensors[f"final_norm.{kind}"]
                        for kind in ("weight", "bias")
                        if f"final_norm.{kind}" in tensors
                    }
                language[spelling["stack"]] = stack
                if last and "head.weight" in tensors:
                    head = torch.cat(
                        [tensors["head.weight"], torch.zeros(padded - config.vocab_size, config.hidden_size)]
                    )
                    language["output_layer"] = {"weight": head.chunk(tensor)[rank]}
                model: dict = {"language_model": language}
                if last and config.model_type == "bert":
                    language["pooler"] = {f"dense.{kind}": tensors[f"pooler.{kind}"] for kind in ("weight", "bias")}
                    model["lm_head"] = {
                        "bias": torch.cat([tensors["head.bias"], torch.zeros(padded - config.vocab_size)]).chunk(
                            tensor
                        )[rank]
                    }
                    for theirs, ours in (("dense", "head_dense"), (spelling["norm"], "head_norm")):
                        model["lm_head"] |= {
                            f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")
                        }
                    model["binary_head"] = {kind: tensors[f"order_head.{kind}"] for kind in ("weight", "bias")}
                if last and pipeline > 1 and "head.weight" not in tensors:
                    model["word_embeddings_for_head"] = {"weight": words}
                content["model" if virtual == 1 else f"model{chunk}"] = model
            path = target / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            path.mkdir(parents=True)
            save(content | (extra or {}), path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration or "release"))
    return folder


def release(
    archive: pathlib.Path, words: int, padded: int, compression: int = zipfile.ZIP_STORED
) -> tuple[ModelConfig, Tensors]:
    """Write a zip like those of 2019 and 2020, without arguments, version and tokenizer; returns what is in it."""
    form = dict(hidden_size=512, num_layers=1, num_attention_heads=8, max_position_embeddings=64)
    config, tensors = model_of(vocab_size=words, openai_gelu=True, **form)
    folder = archive.with_suffix(".files")
    write(folder, config, tensors, version=0.0, year=2019, iteration=None, padded=padded)
    with zipfile.ZipFile(archive, "w", compression) as file:
        for each in sorted(path for path in folder.rglob("*") if path.is_file()):
            file.write(each, each.relative_to(folder))
    shutil.rmtree(folder)
    return config, tensors


def namespace(config: ModelConfig, tensor: int, pipeline: int, padded: int, more: dict) -> argparse.Namespace:
    """Arguments as Megatron keeps them."""
    values = dict(
        num_layers=config.num_layers, hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_size, kv_channels=config.head_dim, padded_vocab_size=padded,
        max_position_embeddings=config.max_position_embeddings, make_vocab_size_divisible_by=64,
        orig_vocab_size=config.vocab_size, layernorm_epsilon=1e-5, tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline, bias_gelu_fusion=False, openai_gelu=False,
        consumed_train_samples=56, consumed_valid_samples=8, params_dtype=torch.float32, lr=1e-3, seq_length=16,
        decoder_num_layers=config.decoder_num_layers,
    )  # fmt: skip
    return argparse.Namespace(**(values | more))


class Foreign:
    """Base of classes that only their pickle will know: megatron.model.enums.ModelType and its like."""

    def __init__(self, *args: object):
        self.args = args

    def __reduce__(self) -> tuple:
        return type(self), self.args


@functools.cache
def _foreign_class(module: str, name: str) -> type[Foreign]:
    return type(name, (Foreign,), {"__module__": module})


def foreign(module: str, name: str, *args: object) -> Foreign:
    """An instance of a class that claims to be `module.name`; `save` writes it."""
    return _foreign_class(module, name)(*args)


def save(content: object, path: pathlib.Path) -> None:
    """torch.save, which pickles a class only if its module has it.

    Its modules exist only during the call: left in sys.modules they would hide the real megatron.core from other tests.
    """
    stand_ins: dict[str, types.ModuleType] = {}
    for kind in Foreign.__subclasses__():
        parts = kind.__module__.split(".")
        for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):  # its packages are looked up too
            stand_ins.setdefault(name, types.ModuleType(name))
        setattr(stand_ins[kind.__module__], kind.__name__, kind)
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        torch.save(content, path)
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)
