"""Adapters in the form of the library peft: a folder with adapter_config.json and adapter_model.safetensors.

Names are those of transformers' modules, from the base's table (huggingface/families/). Where transformers has one
layer for several of ours (q, k and v of GPT-2), its adapter has their A one above the other, and the B of each in
columns of its own. That computes the same, and is of so many times the rank (rank_pattern and alpha_pattern say it).
The head of a classifier is trained whole, and is there under its own name (modules_to_save).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from megalith.checkpoint.formats import Format, HuggingFaceOptions, PeftOptions
from megalith.checkpoint.formats.adapters import BASE, attach, open_base, with_magnitudes
from megalith.checkpoint.formats.huggingface import conversion, files
from megalith.checkpoint.formats.huggingface.family import Family, Rule
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights, for_head
from megalith.common.errors import CheckpointError, problem
from megalith.common.files import write_text
from megalith.config.adapters import A, B, M, adaptable_modules, adapted_modules, trained_whole
from megalith.config.architectures import BERT, BERT_CLASSIFICATION
from megalith.config.flags.text import Words
from megalith.config.heads import is_of_head
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig

CONFIG, TENSORS, PREFIX = files.ADAPTER, "adapter_model", "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight")
MAGNITUDE = ".lora_magnitude_vector"
# Fields of adapter_config.json -> the values with which an adapter is alpha / r B A, of DoRA scaled.
SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",), "bias": ("none", None), "lora_bias": (False, None),
    "use_qalora": (False, None), "use_bdlora": (None,), "layer_replication": (None,),
    "alora_invocation_tokens": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
    "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # PiSSA, OLoRA, ... change the base too
}  # fmt: skip
CLASSIFIER = "SEQ_CLS"  # the task of peft that brings these modules, as far as a model has them
CLASSIFIER_MODULES = ("classifier", "score")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer of transformers, and ours whose outputs it computes.

    name: in a model with a head; a model without one may leave out the prefix. outputs: of each of ours.
    """

    name: str
    prefix: str
    modules: tuple[str, ...]
    outputs: tuple[int, ...]
    rule: Rule
    model: ModelConfig

    @property
    def transposed(self) -> bool:
        """Whether its weight is [in, out], as of transformers' Conv1D. A and B never are."""
        columns = [Lazy.empty((size, 1)) for size in self.outputs]
        return self.rule.conversion.to_hf(columns, self.model).shape[0] == 1

    def split(self, b: Tensor) -> list[Tensor]:
        """Of B [out, rank] the rows of each of our layers."""
        whole = Lazy.of(b.t() if self.transposed else b)
        return [part.read() for part in self.rule.conversion.from_hf(whole, self.model)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """B [out, rank] from the rows of our layers."""
        whole = self.rule.conversion.to_hf([Lazy.of(part) for part in parts], self.model).read()
        return whole.t() if self.transposed else whole


def _family_of(weights: Weights, architecture: str | None) -> Family:
    """The family of transformers' model with these weights; architecture: as of `layers_of`."""
    return conversion.choose_family(weights, HuggingFaceOptions(architecture=architecture))[1]


def layers_of(weights: Weights, architecture: str | None = None) -> list[Layer]:
    """The linear layers that can have adapters, of transformers' model with these weights.

    architecture: its family; None is the one that an export chooses. Raises CheckpointError where there is none.
    """
    model, known = weights.config.model, adaptable_modules(weights.config.model)
    family, found = _family_of(weights, architecture), []
    for rule, name, ours in conversion.parameter_rules(family, model):
        modules = tuple(each.removesuffix(".weight") for each in ours)
        if name.endswith(".weight") and all(each in known for each in modules):
            outputs = tuple(known[each][0] for each in modules)
            found.append(Layer(name.removesuffix(".weight"), family.prefix, modules, outputs, rule, model))
    return found


def head_rules(weights: Weights, architecture: str | None = None) -> list[tuple[Rule, str, tuple[str, ...]]]:
    """(rule, transformers' name, our names) of each tensor of a model's head; [] of a model without one."""
    model = weights.config.model
    rules = conversion.parameter_rules(_family_of(weights, architecture), model)
    return [each for each in rules if all(is_of_head(name, trained_whole(model)) for name in each[2])]


def recognises(path: pathlib.Path) -> bool:
    """Whether this is a folder of adapters, and not also of a model."""
    return (path / CONFIG).is_file() and not any((path / name).exists() for name in files.WEIGHT_FILES)


def read(path: pathlib.Path, options: PeftOptions) -> Weights:
    """Adapters, and the weights of the base that adapter_config.json names, which has to be on this machine."""
    base = open_base(files.read_json(path / CONFIG).get("base_model_name_or_path"), str(path))
    return attach(base, read_adapter(path, base))


def read_adapter(path: pathlib.Path, base: Weights) -> Weights:
    """The adapters of a folder alone, under megalith's names. Raises CheckpointError for what is not implemented.

    Where ranks differ, the smaller ones get rows and columns of zeros; where scales differ, B gets a factor.
    """
    given = files.read_json(path / CONFIG)
    for name, values in SUPPORTED.items():
        if name in given and given[name] not in values:
            rule = f"must be {json.dumps(values[0])}, as nothing else is implemented"
            cure = "Merge the adapters with peft (merge_and_unload()), and load what that saves"
            raise CheckpointError(problem(f"{path / CONFIG}: {name}", given[name], rule, cure))
    stored, pairs = _open(path), dict[str, tuple[Tensor, Tensor, float]]()  # our layer: A, B, scale
    dora = bool(given.get("use_dora"))
    base = _with_head(base, given, stored)
    tensors = _read_head(path, base, given, stored)
    for layer in layers_of(base):
        names = [layer.name, layer.name.removeprefix(layer.prefix)]
        if (name := next((each for each in names if f"{each}{ENDS[0]}" in stored), None)) is None:
            continue
        a, b = (stored.pop(f"{name}{end}", Lazy.empty(())) for end in ENDS)
        inputs = adaptable_modules(base.config.model)[layer.modules[0]][1]
        if len(a.shape) != 2 or a.shape[1] != inputs or b.shape != (sum(layer.outputs), a.shape[0]):
            rule = f"must be A [rank, {inputs}] and B [{sum(layer.outputs)}, rank] for this base"
            found = [list(a.shape), list(b.shape)]
            raise CheckpointError(problem(f"{path}: {name}", found, rule, "Name the base that they were trained on"))
        alpha = _by_pattern(given, "alpha_pattern", name, given.get("lora_alpha", 8))
        scale = alpha / (a.shape[0] ** 0.5 if given.get("use_rslora") else a.shape[0])
        m = stored.pop(f"{name}{MAGNITUDE}", None)
        if (m is not None) != dora or (m is not None and m.shape != b.shape[:1]):
            rule = f"must be [{b.shape[0]}] with use_dora, and not there without it"
            what, shape = f"{path}: {name}{MAGNITUDE}", Words("none") if m is None else list(m.shape)
            raise CheckpointError(problem(what, shape, rule, "Save the adapters with peft anew"))
        parts = _split(layer, a.read(), b.read(), given.get("r", 8), dora)
        pairs |= {each: (*pair, scale) for each, pair in parts.items()}
        if m is not None:
            lengths = zip(layer.modules, layer.split(m.read()[:, None]), strict=True)
            tensors |= {f"model/{each}{M}": Lazy.of(part.squeeze(1)) for each, part in lengths}
    if stored or not pairs:
        rule = "must be of linear layers of the transformer blocks of this base alone, or of its head"
        cure = f"Name the base that they were trained on: --load BASE --adapter {path}"
        raise CheckpointError(problem(f"{path}: adapters", sorted(stored)[:4] or Words("none"), rule, cure))
    rank, scale = max(len(a) for a, _, _ in pairs.values()), max(scale for _, _, scale in pairs.values())
    if scale <= 0.0:
        rule, cure = "must be above 0, or the adapters change nothing", "Load the base alone"
        raise CheckpointError(problem(f"{path / CONFIG}: lora_alpha", given.get("lora_alpha", 8), rule, cure))
    for module, (a, b, own_scale) in pairs.items():
        missing = rank - len(a)
        tensors[f"model/{module}{A}"] = Lazy.of(F.pad(a, (0, 0, 0, missing)))
        tensors[f"model/{module}{B}"] = Lazy.of(F.pad(b, (0, missing)) * (own_scale / scale))
    config = base.config.replace(
        lora_rank=rank, lora_alpha=scale * rank, lora_dropout=float(given.get("lora_dropout") or 0.0),
        lora_target_modules=_patterns(pairs, base.config.model), adapter=None, use_dora=dora,
    )  # fmt: skip
    return Weights(config=config, tensors=tensors, source=str(path))


def _with_head(base: Weights, given: Mapping[str, Any], stored: Mapping[str, Lazy]) -> Weights:
    """The base, with the classifier that peft has put on it where its weights are an encoder's alone."""
    found = stored.get("classifier.weight")
    if given.get("task_type") != CLASSIFIER or found is None or base.config.model.model_type != BERT.name:
        return base
    changes = {"model_type": BERT_CLASSIFICATION.name, "num_classes": found.shape[0]}
    return for_head(base, base.config.replace(**changes).model)


def _read_head(
    path: pathlib.Path, base: Weights, given: Mapping[str, Any], stored: dict[str, Lazy]
) -> dict[str, Lazy]:  # fmt: skip
    """{our name: tensor} of the head, whose tensors are taken out of those of the folder.

    Raises CheckpointError where other modules are trained whole.
    """
    head = head_rules(base)
    modules = {name.rpartition(".")[0] for _, name, _ in head}
    usual = CLASSIFIER_MODULES if given.get("task_type") == CLASSIFIER else ()
    if others := set(given.get("modules_to_save") or ()) - modules - {*usual}:
        rule = f"must be {json.dumps(sorted(modules) or None)}, as nothing else is implemented"
        cure = "Merge the adapters with peft (merge_and_unload()), and load what that saves"
        raise CheckpointError(problem(f"{path / CONFIG}: modules_to_save", sorted(others), rule, cure))
    found = dict[str, Lazy]()
    for each_rule, name, ours in head:
        if name in stored:
            parts = each_rule.conversion.from_hf(stored.pop(name), base.config.model)
            found |= {f"model/{each}": part for each, part in zip(ours, parts, strict=True)}
    return found


def _open(path: pathlib.Path) -> dict[str, Lazy]:
    """{name without peft's prefix: tensor} of the folder's file of tensors."""
    there = [file for ending in ("safetensors", "bin") if (file := path / f"{TENSORS}.{ending}").is_file()]
    if not there:
        rule = f"must hold {TENSORS}.safetensors, or {TENSORS}.bin"
        raise CheckpointError(problem(f"{path}", Words("neither"), rule, "Copy or download it as well"))
    return {name.removeprefix(PREFIX): lazy for name, lazy in files.open_tensors(there[:1]).items()}


def _by_pattern(given: Mapping[str, Any], field: str, module: str, otherwise: Any) -> Any:
    """The value for a module of a field such as alpha_pattern: {regular expression of the end of a name: value}."""
    patterns = (given.get(field) or {}).items()
    return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)


def _split(layer: Layer, a: Tensor, b: Tensor, rank: int, dora: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """{our layer: its A and B} of an adapter of transformers' layer; rank: of most adapters of the folder.

    As `_joined` makes it, each has its own rows of A and columns of B; else all have the same A. With DoRA one whose A
    is zeros has an adapter too, as its magnitudes may have been trained.
    """
    parts, count = layer.split(b), len(layer.modules)
    if count > 1 and len(a) == count * rank:
        blocks = [part.chunk(count, dim=1) for part in parts]
        if not any(bool(block.any()) for n, row in enumerate(blocks) for m, block in enumerate(row) if n != m):
            own = {each: (a.chunk(count)[n], blocks[n][n]) for n, each in enumerate(layer.modules)}
            return {each: pair for each, pair in own.items() if dora or bool(pair[0].any())}  # zeros: it has none
    return {each: (a, part) for each, part in zip(layer.modules, parts, strict=True)}


def _patterns(modules: Collection[str], model: ModelConfig) -> list[str]:
    """--lora-target-modules that name just these layers: none for all, ends of names, or whole names."""
    ends, one = sorted({module.split(".", 2)[-1] for module in modules}), RunConfig().replace(lora_rank=1)
    for patterns in ([], ends, sorted(modules)):
        if adapted_modules(model, one.replace(lora_target_modules=patterns).lora).keys() == set(modules):
            break
    return patterns


def write(weights: Weights, folder: pathlib.Path, options: PeftOptions) -> None:
    """Write a folder that peft loads onto the base. Raises CheckpointError where there are no adapters."""
    if not weights.config.lora.lora_rank:
        rule, cure = "must have adapters, which --to peft writes", "Export the model: --to huggingface"
        raise CheckpointError(problem(weights.source, Words("a whole model"), rule, cure))
    lora, layers = weights.config.lora, layers_of(weights, options.architecture)
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    for layer in layers:
        if any(f"model/{each}{A}" in weights.tensors for each in layer.modules):
            a, b = _joined(layer, weights)
            magnitude = [(MAGNITUDE, _joined_magnitude(layer, weights))] if lora.use_dora else []
            for end, tensor in [*zip(ENDS, (a, b), strict=True), *magnitude]:
                tensor = tensor.to(getattr(torch, options.dtype)) if options.dtype else tensor
                tensors[f"{PREFIX}{layer.name}{end}"] = tensor.clone(memory_format=torch.contiguous_format)
            ranks[layer.name] = len(a)
    whole = set[str]()  # modules that are trained whole
    for each_rule, name, ours in head_rules(weights, options.architecture):
        parts = [weights.tensors[f"model/{each}"] for each in ours]
        tensor = each_rule.conversion.to_hf(parts, weights.config.model).read()
        tensor = tensor.to(getattr(torch, options.dtype)) if options.dtype else tensor
        tensors[f"{PREFIX}{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        whole.add(name.rpartition(".")[0])
    named = _shortest(ranks, _family_of(weights, options.architecture), weights.config.model)
    larger = {named[name]: rank for name, rank in ranks.items() if rank != lora.lora_rank}
    scale = lora.scale
    record = weights.config.model.architecture
    kind = CLASSIFIER if record.name == BERT_CLASSIFICATION.name else None
    if record.causal:
        kind = "SEQ_2_SEQ_LM" if record.decoder else "CAUSAL_LM"
    content = {
        "peft_type": "LORA", "task_type": kind,
        "base_model_name_or_path": weights.train_state.get(BASE, {}).get("path"), "inference_mode": True,
        "r": lora.lora_rank, "lora_alpha": _number(scale * lora.lora_rank), "lora_dropout": lora.lora_dropout,
        "target_modules": sorted(set(named.values())), "bias": "none", "use_dora": lora.use_dora, "use_rslora": False,
        "fan_in_fan_out": any(layer.transposed for layer in layers), "modules_to_save": sorted(whole) or None,
        "rank_pattern": larger, "alpha_pattern": {name: _number(scale * rank) for name, rank in larger.items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{TENSORS}.safetensors", {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")  # last, as it makes the folder an adapter


def _shortest(names: Collection[str], family: Family, model: ModelConfig) -> dict[str, str]:
    """{layer: what peft finds it by}: the last part of its name, or all of it where that would name other layers too.

    Such are `dense` in the heads of BERT.
    """
    rules = conversion.parameter_rules(family, model)
    others = {name.removesuffix(".weight") for _, name, _ in rules if name.endswith(".weight")} - set(names)
    ends = {name: name.rpartition(".")[2] for name in names}
    return {name: name for name in names} if {each.rpartition(".")[2] for each in others} & {*ends.values()} else ends


def _joined(layer: Layer, weights: Weights) -> tuple[Tensor, Tensor]:
    """A and B of transformers' layer from those of ours; zeros for one of several that has no adapter."""
    rank, count, pairs = weights.config.lora.lora_rank, len(layer.modules), []
    inputs = adaptable_modules(layer.model)[layer.modules[0]][1]
    for module, outputs in zip(layer.modules, layer.outputs, strict=True):
        named = [weights.tensors.get(f"model/{module}{end}") for end in (A, B)]
        none = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
        pairs.append([zeros if lazy is None else lazy.read() for lazy, zeros in zip(named, none, strict=True)])
    parts = [F.pad(b, (n * rank, (count - 1 - n) * rank)) for n, (_, b) in enumerate(pairs)]
    return torch.cat([a for a, _ in pairs]), layer.join(parts)


def _joined_magnitude(layer: Layer, weights: Weights) -> Tensor:
    """DoRA's magnitudes of transformers' layer; the lengths of the rows of one of several that has no adapter."""
    whole = with_magnitudes(weights, weights.config.replace(lora_target_modules=list(layer.modules)))
    found = {**whole.tensors, **weights.tensors}
    return layer.join([found[f"model/{module}{M}"].read()[:, None] for module in layer.modules])[:, 0]


def _number(value: float) -> float | int:
    """The value, an int where it is one."""
    return int(value) if value == int(value) else value


FORMAT = Format(
    "peft: a folder of adapters, with adapter_config.json and adapter_model.safetensors",
    recognises,
    PeftOptions,
    read,
    write,
)
