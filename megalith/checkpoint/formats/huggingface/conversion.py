"""Hugging Face folders: config.json, tensors, tokenizer. What a family's names and fields mean is in families/*.py."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megalith.checkpoint.formats import Format, Options
from megalith.checkpoint.formats.huggingface import files, tokenizer
from megalith.checkpoint.formats.huggingface.family import ACTIVATIONS, FAMILIES, KINDS, TAKE, Family, form
from megalith.checkpoint.formats.huggingface.tied import resolve_ties
from megalith.checkpoint.formats.huggingface.twice import differing, rope_of
from megalith.checkpoint.tensors.lazy import Lazy, check_range
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.files import write_text
from megalith.common.registry import load
from megalith.config.architectures import architecture
from megalith.config.checks.model import form_problems
from megalith.config.flags.text import fail, flag
from megalith.config.parameters import initial, parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.source_fields import checked

CONFIG, GENERATION = "config.json", "generation_config.json"
LARGEST = 2**50  # elements of one tensor: more are of a mistyped size, and even the shape of such a tensor overflows
IDS = ("bos_token_id", "pad_token_id")
KEPT = (
    "huggingface/"  # where a checkpoint of ours keeps config.json and generation_config.json of what it was made from
)


def recognises(path: pathlib.Path) -> bool:
    """A folder with a config.json that says which model it is, or an adapter's, which `read` refuses by name."""
    if (path / files.ADAPTER).is_file():
        return True
    return (path / CONFIG).is_file() and bool({"model_type", "architectures"} & files.read_json(path / CONFIG).keys())


def family_of(given: Mapping[str, Any], where: pathlib.Path) -> tuple[str, Family]:
    """The family of a config.json. Raises CheckpointError where it is not one of ours."""
    name = given.get("model_type")
    if name not in FAMILIES.addresses:
        rule = f"the architectures known here are {', '.join(FAMILIES)}"
        cure = "Convert a model of one of these, or describe the new one in a table as megalith/checkpoint/families/ has them"
        raise CheckpointError(problem(f"{where}: model_type", name, rule, cure))
    return name, FAMILIES.find(name)


def own_family(options: Options) -> Family | None:
    """That of a model of one's own, as which a folder is to be read; None where config.json says what it is."""
    name = options.own_model("huggingface")
    return None if name is None else load("Hugging Face family", architecture(name).names["huggingface"])


def read(path: pathlib.Path, options: Options) -> Weights:
    """The weights of a folder, tensors unread, in the dtype they are stored in."""
    if not (path / CONFIG).is_file():  # an adapter alone
        files.weight_files(path)
    given = checked(files.read_json(path / CONFIG), KINDS, str(path / CONFIG))
    if own_family(options) is None:
        family_of(given, path / CONFIG)
    if quantization := given.get("quantization_config"):
        raise _quantized(path, quantization.get("quant_method", quantization))
    stored, beside = files.read_tensors(path, given.get("transformers_weights"))
    weights = _weights(given, stored, path, options)
    notes = (*beside, *weights.notes)
    if (path / GENERATION).is_file():
        found = checked(files.read_json(path / GENERATION), {name: KINDS[name] for name in IDS}, str(path / GENERATION))
        notes += tuple(_beyond(found, GENERATION, weights.config.model.vocab_size or 0))
    kept = {f"{KEPT}{name}": path / name for name in (CONFIG, GENERATION) if (path / name).is_file()}
    along = {**kept, **tokenizer.found_in(options.tokenizer or path)}
    return dataclasses.replace(weights, files=along, notes=notes)


def of_model(model: nn.Module) -> Weights:
    """The weights of a model of transformers, whose memory they share. Raises CheckpointError as `read` does."""
    where, config = pathlib.Path(type(model).__name__), json.loads(model.config.to_json_string(use_diff=False))
    given = checked(config | {"architectures": [type(model).__name__]}, KINDS, str(where / CONFIG))
    _, family = family_of(given, where / CONFIG)
    named = {family.in_memory.get(name, name): tensor for name, tensor in model.state_dict().items()}
    tensors = {name: Lazy.of(tensor.detach()) for name, tensor in named.items()}
    return dataclasses.replace(_weights(given, tensors, where, Options()), source=str(where))


def _weights(given: Mapping[str, Any], stored: Mapping[str, Lazy], path: pathlib.Path, options: Options) -> Weights:
    """Those of tensors under their names. given: config.json. path: what messages call it."""
    family = own_family(options) or family_of(given, path / CONFIG)[1]
    # Models that came from TensorFlow call a norm's parameters gamma and beta; transformers renames them too.
    found = {
        re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): tensor for name, tensor in stored.items()
    }
    if len(found) < len(stored):
        rule = "a norm's parameters are called weight and bias, or gamma and beta in files that came from TensorFlow"
        both = [name for name in stored if re.search(r"\.(gamma|beta)$", name)]
        raise CheckpointError(
            problem(f"{path}: weights", both[:6], f"{rule}, and here both are there", "Copy all files of one version")
        )
    twice = differing(given, family.aliases)
    given = family.checked(given, str(path / CONFIG))
    for each in family.settings:
        if each.ours in ("num_layers", "decoder_num_layers") and (given.get(each.theirs) or 0) > len(found):
            rule = f"a layer has tensors, and this folder has {len(found)} in all"
            cure = "Take config.json and weights from one and the same model"
            raise CheckpointError(problem(f"{path / CONFIG}: {each.theirs}", given[each.theirs], rule, cure))
    values = family.to_ours(given, str(path / CONFIG))
    values |= family.of_tensors(found)
    found, untied, ties = resolve_ties(found, family, {**values, **options.overrides})
    values |= untied
    dtypes = {lazy.dtype for lazy in found.values()}
    values |= {"seq_length": values.get("max_position_embeddings"), "bf16": torch.bfloat16 in dtypes}
    values |= options.overrides
    config = RunConfig().replace(**{**architecture(values["model_type"]).defaults, **values})
    called = {flag(each.ours): each.theirs for each in family.settings if each.ours not in options.overrides}
    texts = [f"{path / CONFIG}: {each.text}" for each in form_problems(config)]
    fail((re.sub(r"--[\w-]+", lambda word: called.get(word[0], word[0]), text) for text in texts), CheckpointError)
    found, told = family.adapt(found, config.model)
    tensors, notes = _ours(found, family, config.model, path, family.heads(given))
    if "dynamic" in str(rope_of(given)):
        notes += (
            "rope_type dynamic is left out: it acts beyond max_position_embeddings alone, where no sequence here goes",
        )
    notes += tuple(_beyond(given, CONFIG, config.model.vocab_size))
    return Weights(config=config, tensors=tensors, notes=(*twice, *ties, *told, *notes))


def _beyond(given: Mapping[str, Any], file: str, words: int) -> Iterator[str]:
    """A line for each id of a part (bos, eos, ...) that is of no word of the vocabulary."""
    for name in tokenizer.IDS:
        ids = given[name] if isinstance(given.get(name), list) else [given.get(name)]
        if beyond := [each for each in ids if isinstance(each, int) and each >= words]:
            said = f"{file}: {name} {', '.join(map(str, beyond))}"
            yield f"{said} is beyond the vocabulary of {words}: nothing ever has that id"


def _quantized(path: pathlib.Path, method: Any) -> CheckpointError:
    rule = "weights are quantized, and only those in float64, float32, float16 or bfloat16 are read"
    return CheckpointError(
        problem(f"{path}: weights", method, rule, "Save the model dequantized (model.dequantize() in transformers)")
    )


def _ours(
    found: Mapping[str, Lazy], family: Family, model: ModelConfig, path: pathlib.Path, heads: tuple[str, ...]
) -> tuple[dict[str, Lazy], tuple[str, ...]]:
    """Our tensors, made of theirs when they are read; and notes on what was left out or is new. Everything must be there and fit.

    heads: beginnings of names; one that the folder has nothing of is begun anew.
    """
    shapes = parameter_shapes(model)
    made: dict[str, Lazy] = {}
    used, missing, wrong, new = set[str](), list[str](), list[str](), list[str]()
    absent = tuple(
        head for head in heads if not any(name.startswith((head, head.removeprefix(family.prefix))) for name in found)
    )
    for rule, theirs, ours in rules(family, model):
        name = next((each for each in (theirs, theirs.removeprefix(family.prefix)) if each in found), None)
        if any(math.prod(shapes[each]) > LARGEST for each in ours):
            wrong.append(
                f"{theirs}: found {list(found[name].shape) if name else None}, expected {[list(shapes[each]) for each in ours]}"
            )
            continue
        expected = rule.form.together([Lazy.empty(shapes[each]) for each in ours], model).shape
        if name is None and theirs.startswith(absent):
            made |= {
                f"model/{each}": _begun(each, shapes[each], model, next(iter(found.values())).dtype) for each in ours
            }
            new += ours
        elif name is None:
            missing.append(theirs)
        elif (dtype := found[name].dtype).itemsize < 2 or not dtype.is_floating_point:
            raise _quantized(path, f"{name}: {dtype}")
        elif found[name].shape != expected:
            wrong.append(f"{name}: found {list(found[name].shape)}, expected {list(expected)}")
        else:
            used.add(name)
            parts = rule.form.apart(found[name], model)
            made |= {f"model/{each}": part for each, part in zip(ours, parts, strict=True)}
    if wrong:
        rule_text = f"{path / CONFIG} says which shapes they have"
        raise CheckpointError(
            problem(
                f"{path}: tensors of another shape", wrong[:6], rule_text, "Take both files from one and the same model"
            )
        )
    if missing:
        rule_text = f"{family.architecture} as {path / CONFIG} describes it has {len(missing)} more"
        raise CheckpointError(
            problem(f"{path}: missing tensors", missing[:6], rule_text, "Copy all of the model's files, of one version")
        )
    unnamed = sorted(f"model/{name}" for name in shapes if f"model/{name}" not in made)
    if unnamed:
        rule_text = f"the table of {family.architecture} names every parameter of the model that it describes"
        raise CheckpointError(
            problem(f"{path}: parameters without a rule", unnamed[:6], rule_text, "Add them to the family's table")
        )
    spare = sorted(name for name in found.keys() - used if not any(re.fullmatch(each, name) for each in family.surplus))
    if beyond := [name for name in spare if _further(name, used)]:
        layers = f"{model.num_layers}" + f" and {model.decoder_layers} in the decoder" * bool(model.decoder_layers)
        rule_text = f"{path / CONFIG}, or a flag, says that there are {layers}"
        cure = "Take both files from one and the same model, or mend the number of layers"
        raise CheckpointError(problem(f"{path}: tensors of further layers", beyond[:6], rule_text, cure))
    notes = [f"not in this folder, so new and untrained: {', '.join(new)}"] * bool(new)
    notes += [f"left out, as this model has no use for them: {', '.join(spare[:8])}{' ...' * (len(spare) > 8)}"] * bool(
        spare
    )
    return made, tuple(notes)


def _further(name: str, used: set[str]) -> bool:
    """Whether a tensor that was not used is of one more layer: the first layer has one of this name, that was."""
    return any(f"{name[: at.start()]}.0.{name[at.end() :]}" in used for at in re.finditer(r"\.\d+\.", name))


def _begun(name: str, shape: tuple[int, ...], model: ModelConfig, dtype: torch.dtype) -> Lazy:
    """A parameter of a new head, as it starts in a new model, but for the numbers that are drawn."""
    kind, value = initial(model, name)

    def read() -> torch.Tensor:
        if kind == "constant":
            return torch.full(shape, value)
        drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=drawn) * (value if kind == "normal" else model.init_method_std)

    return Lazy(shape=shape, dtype=torch.float32, read=read).to(dtype)


def rules(family: Family, model: ModelConfig) -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """(rule, their tensor, our tensors) for every parameter of the model."""
    shapes = parameter_shapes(model)
    for rule in (each for each in family.names if each.when(model)):
        for theirs, ours in rule.pairs(shapes, model):
            yield rule, theirs, ours


def write(weights: Weights, folder: pathlib.Path, options: Options) -> None:
    """Write a folder that `from_pretrained` reads: tensors in shards, config.json, generation_config.json, tokenizer files."""
    model = weights.config.model
    name, family = choose(weights, options)
    if options.dtype:
        check_range(
            {each: lazy for each, lazy in weights.tensors.items() if each.startswith("model/")},
            getattr(torch, options.dtype),
        )
    made: dict[str, Lazy] = {}
    for rule, theirs, ours in rules(family, model):
        parts = [weights.tensors[f"model/{each}"] for each in ours]
        parts = [each.to(getattr(torch, options.dtype)) for each in parts] if options.dtype else parts
        made[theirs] = rule.form.together(parts, model)
    if model.untie_embeddings_and_output_weights:  # transformers then unties all
        made |= {
            copy: made[each.original]
            for copy, each in family.copies.items()
            if each.differing == TAKE and each.original in made
        }
    folder.mkdir(parents=True, exist_ok=True)
    dtype = max((lazy.dtype for lazy in made.values()), key=lambda each: each.itemsize)
    made |= {name: lazy.to(dtype) for name, lazy in family.added(model).items()}
    content = _config(weights, name, family)
    content["dtype" if "dtype" in content else "torch_dtype"] = str(dtype).removeprefix(
        "torch."
    )  # transformers 5's word, and 4's
    files.write_tensors(folder, made, options.max_shard_size, options.safetensors)
    words = tokenizer.written(tokenizer.found_in(options.tokenizer) if options.tokenizer else weights.files)
    for each, data in words.items():
        (folder / each).write_bytes(data)
    if f"{KEPT}{CONFIG}" not in weights.files:
        content |= tokenizer.ids(words, content)
    kept = weights.files.get(f"{KEPT}{GENERATION}")
    ids = {key: content[key] for key in tokenizer.IDS if key in content}
    text = (
        kept.read_text(encoding="utf-8") if kept else json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n"
    )
    write_text(folder / GENERATION, text)
    write_text(
        folder / CONFIG, json.dumps(content, indent=2) + "\n"
    )  # last: without it nobody takes the folder for a whole one


def choose(weights: Weights, options: Options) -> tuple[str, Family]:
    """The family to write: the one asked for, that of the source, or the first whose config.json can say all of this model."""
    model = weights.config.model
    own = None if options.architecture else own_family(Options(assumed={"model_type": model.model_type}))
    kept = weights.files.get(f"{KEPT}{CONFIG}")
    first = options.architecture or (files.read_json(kept).get("model_type") if kept else None)
    names = (
        [options.architecture]
        if options.architecture
        else list(dict.fromkeys([*([first] if first else []), *FAMILIES]))
    )
    losses: dict[str, list[str]] = {}
    families = {model.architecture.name: own} if own else {}  # found as they are needed
    for name in families or names:
        family = families.setdefault(name, own or FAMILIES.find(name))
        losses[name] = _losses(family, weights.config)
        if not losses[name]:
            return name, family
    nearest = min(losses, key=lambda each: (model.model_type not in families[each].models, len(losses[each])))
    raise CheckpointError(
        problem("architecture", " and ".join(losses[nearest]), f"{families[nearest].architecture} has no such form" +
                ("" if options.architecture else ", nor has another of the architectures known here"),
                "Export to megatron, which can hold it, or train a model of a form that Hugging Face has")
    )  # fmt: skip


def _losses(family: Family, config: RunConfig) -> list[str]:
    """What of the model the family's config.json cannot say: what is read back from it differs in this."""
    mine = form(config.model)
    try:
        theirs = family.to_theirs(config)
        if any(name in theirs and theirs[name] is None for name in ACTIVATIONS):
            return [f"activation {config.model.activation}"]
        values = family.to_ours(json.loads(json.dumps(theirs)))
        other = form(RunConfig().replace(**values).model)
    except (CheckpointError, ConfigError) as error:
        return [f"activation {config.model.activation}" if "activation" in str(error) else str(error)]
    return [f"{key} {value}" for key, value in mine.items() if other.get(key) != value]


def _config(weights: Weights, name: str, family: Family) -> dict[str, Any]:
    """config.json: that of the source where it still says the same, else made from ours over it."""
    made = {"architectures": [family.architecture], "model_type": name, **family.to_theirs(weights.config)}
    kept = weights.files.get(f"{KEPT}{CONFIG}")
    source = files.read_json(kept) if kept else {}
    if source.get("model_type") != name:
        return made
    before = RunConfig().replace(**family.to_ours(source))
    if form(before.model) == form(weights.config.model):
        return source
    return {key: value for key, value in source.items() if key not in ("rope_parameters", *family.aliases)} | made


FORMAT = Format(
    "huggingface: a folder with config.json and model.safetensors or pytorch_model.bin", recognises, read, write
)
