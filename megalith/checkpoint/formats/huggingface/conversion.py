"""Hugging Face folders: config.json, tensors, tokenizer. The names and fields of each family are in families/*.py."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megalith.checkpoint.formats import Format, HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import contradictions, files, tokenizer
from megalith.checkpoint.formats.huggingface.family import (
    ACTIVATION_KEYS,
    CONFIG_SCHEMA,
    FAMILIES,
    USE_TIED,
    Family,
    Rule,
    architecture_fields,
)
from megalith.checkpoint.formats.huggingface.tied import resolve_ties
from megalith.checkpoint.tensors.lazy import Lazy, check_range
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.files import write_text
from megalith.common.registry import load
from megalith.config.architectures import architecture
from megalith.config.checks.model import form_problems
from megalith.config.flags.text import Words, fail, flag
from megalith.config.parameters import initial, parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.source_fields import checked

CONFIG, GENERATION = "config.json", "generation_config.json"
MAX_ELEMENTS = 2**50  # of one tensor: a larger one has a mistyped size, with which even computing its shape overflows
CHECKED_IDS = ("bos_token_id", "pad_token_id")  # of generation_config.json; eos_token_id may be a list
SOURCE_FOLDER = "huggingface/"  # in megalith's checkpoint, for the source's config.json and generation_config.json


def recognises(path: pathlib.Path) -> bool:
    """Whether this is a folder with a config.json that names its model, or an adapter's, which `read` refuses."""
    if (path / files.ADAPTER).is_file():
        return True
    return (path / CONFIG).is_file() and bool({"model_type", "architectures"} & files.read_json(path / CONFIG).keys())


def family_of(given: Mapping[str, Any], where: pathlib.Path) -> tuple[str, Family]:
    """The family of a config.json. Raises CheckpointError where it is not in FAMILIES."""
    name = given.get("model_type")
    if name not in FAMILIES.addresses:
        rule = f"must be one of {', '.join(FAMILIES)}"
        cure = "Convert a model of one of these, or describe the new one in a table like those of huggingface/families/"
        raise CheckpointError(problem(f"{where}: model_type", name, rule, cure))
    return name, FAMILIES.find(name)


def custom_family(options: HuggingFaceOptions) -> Family | None:
    """The family of the user's own model as which a folder is read; None where config.json names the family."""
    name = options.custom_model("huggingface")
    return None if name is None else load("Hugging Face family", architecture(name).names["huggingface"])


def read(path: pathlib.Path, options: HuggingFaceOptions) -> Weights:
    """The weights of a folder, in the dtype they are stored in, to be read when asked for.

    Only copies are read at once, to compare them: of tied tensors, or of one tensor in two files.
    """
    if not (path / CONFIG).is_file():  # an adapter alone
        files.weight_files(path)
    given = checked(files.read_json(path / CONFIG), CONFIG_SCHEMA, str(path / CONFIG))
    if custom_family(options) is None:
        family_of(given, path / CONFIG)
    if quantization := given.get("quantization_config"):
        raise _quantized(path, quantization.get("quant_method", quantization))
    stored, file_notes = files.read_tensors(path, given.get("transformers_weights"))
    weights = _build_weights(given, stored, path, options)
    notes = (*file_notes, *weights.notes)
    if (path / GENERATION).is_file():
        schema = {name: CONFIG_SCHEMA[name] for name in CHECKED_IDS}
        found = checked(files.read_json(path / GENERATION), schema, str(path / GENERATION))
        notes += tuple(contradictions.ids_beyond_vocabulary(found, GENERATION, weights.config.model.vocab_size or 0))
    source = {f"{SOURCE_FOLDER}{name}": path / name for name in (CONFIG, GENERATION) if (path / name).is_file()}
    copied = {**source, **tokenizer.tokenizer_files(options.tokenizer or path)}
    return dataclasses.replace(weights, files=copied, notes=notes)


def weights_of_module(model: nn.Module) -> Weights:
    """The weights of transformers' model in memory, which they share. Raises CheckpointError as `read` does."""
    tensors = {name: Lazy.of(tensor.detach()) for name, tensor in model.state_dict().items()}
    return weights_of_tensors(model.config, type(model), tensors)


def weights_of_tensors(config: Any, model_class: type, tensors: Mapping[str, Lazy]) -> Weights:
    """The weights of a model of transformers, from its configuration, its class and its state_dict."""
    where, content = pathlib.Path(model_class.__name__), json.loads(config.to_json_string(use_diff=False))
    given = checked(content | {"architectures": [model_class.__name__]}, CONFIG_SCHEMA, str(where / CONFIG))
    _, family = family_of(given, where / CONFIG)
    named = {family.file_names.get(name, name): tensor for name, tensor in tensors.items()}
    return dataclasses.replace(_build_weights(given, named, where, HuggingFaceOptions()), source=str(where))


def _build_weights(
    given: Mapping[str, Any], stored: Mapping[str, Lazy], path: pathlib.Path, options: HuggingFaceOptions
) -> Weights:
    """Weights from tensors under Hugging Face's names. given: config.json. path: the folder's name in messages."""
    family = custom_family(options) or family_of(given, path / CONFIG)[1]
    # Models that came from TensorFlow call a norm's parameters gamma and beta; transformers renames them too.
    found = {
        re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): tensor for name, tensor in stored.items()
    }
    if len(found) < len(stored):
        rule = "must name a norm's parameters weight and bias, or gamma and beta as TensorFlow does, and not both"
        both = [name for name in stored if re.search(r"\.(gamma|beta)$", name)]
        raise CheckpointError(problem(f"{path}: weights", both[:6], rule, "Copy all files of one version"))
    disagreements = contradictions.find_contradictions(given, family.aliases)
    given = family.checked(given, str(path / CONFIG))
    for each in family.config_fields:
        if each.name in ("num_layers", "decoder_num_layers") and (given.get(each.hf_name) or 0) > len(found):
            rule = f"must be at most {len(found)}, the number of tensors in this folder"
            cure = "Take config.json and weights from one and the same model"
            raise CheckpointError(problem(f"{path / CONFIG}: {each.hf_name}", given[each.hf_name], rule, cure))
    values = family.config_from_hf(given, str(path / CONFIG))
    values |= family.config_from_tensors(found)
    found, untied, ties = resolve_ties(found, family, {**values, **options.overrides})
    values |= untied
    dtypes = {lazy.dtype for lazy in found.values()}
    values |= {"seq_length": values.get("max_position_embeddings"), "bf16": torch.bfloat16 in dtypes}
    values |= options.overrides
    config = RunConfig().replace(**{**architecture(values["model_type"]).defaults, **values})
    # Problems name the flags of a run; where config.json states the value, its own field is named instead.
    called = {flag(each.name): each.hf_name for each in family.config_fields if each.name not in options.overrides}
    texts = [f"{path / CONFIG}: {each.text}" for each in form_problems(config)]
    fail((re.sub(r"--[\w-]+", lambda word: called.get(word[0], word[0]), text) for text in texts), CheckpointError)
    found, adaptations = family.adapt_tensors(found, config.model)
    tensors, notes = _convert_tensors(found, family, config.model, path, family.lacked_heads(given))
    if "dynamic" in str(contradictions.rope_parameters(given)):
        notes += (
            "rope_type dynamic is left out: it acts beyond max_position_embeddings alone, which no sequence exceeds",
        )
    notes += tuple(contradictions.ids_beyond_vocabulary(given, CONFIG, config.model.vocab_size))
    return Weights(config=config, tensors=tensors, notes=(*disagreements, *ties, *adaptations, *notes))


def _quantized(path: pathlib.Path, method: Any) -> CheckpointError:
    rule = "must be in float64, float32, float16 or bfloat16, and not quantized"
    cure = "Save the model dequantized (model.dequantize() in transformers)"
    return CheckpointError(problem(f"{path}: weights", method, rule, cure))


def _convert_tensors(
    found: Mapping[str, Lazy], family: Family, model: ModelConfig, path: pathlib.Path, heads: tuple[str, ...]
) -> tuple[dict[str, Lazy], tuple[str, ...]]:
    """{"model/<parameter>": tensor, converted when it is read}, and notes on what was left out or is new.

    found: under Hugging Face's names, with or without the family's prefix.
    heads: beginnings of names of heads; one that the folder has nothing of is initialized.
    Raises CheckpointError unless every other tensor is there, has its shape and is not quantized, and for tensors of
    layers that the model does not have. Other tensors that no rule names are left out, with a note.
    """
    shapes = parameter_shapes(model)
    converted: dict[str, Lazy] = {}
    used, missing, wrong, new = set[str](), list[str](), list[str](), list[str]()
    absent = tuple(
        head for head in heads if not any(name.startswith((head, head.removeprefix(family.prefix))) for name in found)
    )
    for rule, hf_name, names in parameter_rules(family, model):
        name = next((each for each in (hf_name, hf_name.removeprefix(family.prefix)) if each in found), None)
        if any(math.prod(shapes[each]) > MAX_ELEMENTS for each in names):
            shape = list(found[name].shape) if name else None
            wrong.append(f"{hf_name} of shape {shape} instead of {[list(shapes[each]) for each in names]}")
            continue
        expected = rule.conversion.to_hf([Lazy.empty(shapes[each]) for each in names], model).shape
        if name is None and hf_name.startswith(absent):
            dtype = next(iter(found.values())).dtype
            converted |= {f"model/{each}": _initialized(each, shapes[each], model, dtype) for each in names}
            new += names
        elif name is None:
            missing.append(hf_name)
        elif (dtype := found[name].dtype).itemsize < 2 or not dtype.is_floating_point:
            raise _quantized(path, f"{name}: {dtype}")
        elif found[name].shape != expected:
            wrong.append(f"{name} of shape {list(found[name].shape)} instead of {list(expected)}")
        else:
            used.add(name)
            parts = rule.conversion.from_hf(found[name], model)
            converted |= {f"model/{each}": part for each, part in zip(names, parts, strict=True)}
    same_model = "Take both files from one and the same model"
    if wrong:
        rule_text = f"must have the shapes that {path / CONFIG} gives them"
        raise CheckpointError(problem(f"{path}: tensors", wrong[:6], rule_text, same_model))
    if missing:
        rule_text = f"must be all those of {family.architecture}, as {path / CONFIG} describes it"
        lacked = Words(f"{len(missing)} missing: {_listed(missing, 6)}")
        cure = "Copy all of the model's files, of one version"
        raise CheckpointError(problem(f"{path}: tensors", lacked, rule_text, cure))
    _require_rules(family, (name for name in shapes if f"model/{name}" not in converted), "")
    spare = sorted(name for name in found.keys() - used if not _matches(family.ignored, name))
    if beyond := [name for name in spare if _is_in_further_layer(name, used)]:
        layers = f"{model.num_layers}" + f" and {model.decoder_layers} in the decoder" * bool(model.decoder_layers)
        rule_text = f"must be of as many layers as {path / CONFIG}, or a flag, says that there are ({layers})"
        cure = f"{same_model}, or correct the number of layers"
        raise CheckpointError(problem(f"{path}: tensors", beyond[:6], rule_text, cure))
    notes = [f"not in this folder, so new and untrained: {', '.join(new)}"] * bool(new)
    notes += [f"left out, as this model has no use for them: {_listed(spare, 8)}"] * bool(spare)
    return converted, tuple(notes)


def _listed(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + " ..." * (len(names) > most)


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _require_rules(family: Family, unnamed: Iterable[str], alternative: str) -> None:
    """Raise CheckpointError where there are parameters that no rule of the family names."""
    if names := sorted(unnamed):
        raise CheckpointError(
            f"The table of {family.architecture} has no rule for {len(names)} of this model's parameters: "
            f"{_listed(names, 6)}. Add a Rule for each to the family's `rules`{alternative}."
        )


def _is_in_further_layer(name: str, used: set[str]) -> bool:
    """Whether an unused tensor is of a layer beyond the last: layer 0's tensor of this name was used."""
    return any(f"{name[: at.start()]}.0.{name[at.end() :]}" in used for at in re.finditer(r"\.\d+\.", name))


def _initialized(name: str, shape: tuple[int, ...], model: ModelConfig, dtype: torch.dtype) -> Lazy:
    """A parameter of a new head, drawn as in a new model, but with other random numbers, and never by Xavier's rule."""
    kind, value = initial(model, name)

    def read() -> torch.Tensor:
        if kind == "constant":
            return torch.full(shape, value)
        drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=drawn) * (value if kind == "normal" else model.init_method_std)

    return Lazy(shape=shape, dtype=torch.float32, read=read).to(dtype)


def parameter_rules(family: Family, model: ModelConfig) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
    """(rule, Hugging Face's name of the tensor, megalith's names) for every parameter that the family's rules name."""
    shapes = parameter_shapes(model)
    for rule in (each for each in family.rules if each.when(model)):
        for hf_name, names in rule.pairs(shapes, model):
            yield rule, hf_name, names


def write(weights: Weights, folder: pathlib.Path, options: HuggingFaceOptions) -> None:
    """Write a folder that `from_pretrained` reads.

    It has tensors in shards, config.json, generation_config.json and tokenizer files. Raises CheckpointError where no
    family can represent the model, the family has no rule for some of its parameters, or values exceed options.dtype.
    """
    model_type, family = choose_family(weights, options)
    converted = tensors_of_family(weights, family, options)
    folder.mkdir(parents=True, exist_ok=True)
    content = _config_json(weights, model_type, family)
    dtype_key = "dtype" if "dtype" in content else "torch_dtype"  # in transformers 5, and in 4
    content[dtype_key] = str(_widest(converted)).removeprefix("torch.")
    files.write_tensors(folder, converted, options.max_shard_size, options.safetensors)
    available = tokenizer.tokenizer_files(options.tokenizer) if options.tokenizer else weights.files
    tokenizer_files = tokenizer.files_for_transformers(available)
    for each, data in tokenizer_files.items():
        (folder / each).write_bytes(data)
    if f"{SOURCE_FOLDER}{CONFIG}" not in weights.files:
        content |= tokenizer.token_ids(tokenizer_files, content)
    elif options.tokenizer:  # not the source's: finetuned on chats, say
        content |= tokenizer.end_of_text(tokenizer_files, content)
    stored, made = weights.files.get(f"{SOURCE_FOLDER}{GENERATION}"), tokenizer_files if options.tokenizer else {}
    write_text(folder / GENERATION, tokenizer.generation_config(stored, content, made))
    # Last: without a config.json nobody takes the folder for a complete one.
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def tensors_of_family(weights: Weights, family: Family, options: HuggingFaceOptions) -> dict[str, Lazy]:
    """The model's tensors under the names and in the layout of the family's files.

    Raises CheckpointError where the family has no rule for a parameter, or values exceed options.dtype.
    """
    model = weights.config.model
    rules = list(parameter_rules(family, model))
    named = {f"model/{name}" for _, _, names in rules for name in names}
    parameters = {name: lazy for name, lazy in weights.tensors.items() if name.startswith("model/")}
    unnamed = [name.removeprefix("model/") for name in parameters if name not in named]
    alternative = ", or list it in `not_exported` to export the model without it"
    _require_rules(family, (name for name in unnamed if not _matches(family.not_exported, name)), alternative)
    if options.dtype:
        check_range(parameters, dtype := getattr(torch, options.dtype))
        parameters = {name: lazy.to(dtype) for name, lazy in parameters.items()}
    converted = {
        hf_name: rule.conversion.to_hf([parameters[f"model/{each}"] for each in names], model)
        for rule, hf_name, names in rules
    }
    # Without tie_word_embeddings transformers ties no pair at all: the file needs both of each.
    if model.untie_embeddings_and_output_weights:
        converted |= {
            tied: converted[each.original]
            for tied, each in family.tied.items()
            if each.if_different == USE_TIED and each.original in converted
        }
    return converted | {name: lazy.to(_widest(converted)) for name, lazy in family.added_tensors(model).items()}


def _widest(tensors: Mapping[str, Lazy]) -> torch.dtype:
    return max((lazy.dtype for lazy in tensors.values()), key=lambda each: each.itemsize)


def choose_family(weights: Weights, options: HuggingFaceOptions) -> tuple[str, Family]:
    """(config.json's model_type, family) to write, one that can represent the model.

    It is the one asked for; else, for a user's own model with a family, that; else the source's, or the first of
    FAMILIES that can. Raises CheckpointError where there is none.
    """
    model = weights.config.model
    custom = HuggingFaceOptions(assumed={"model_type": model.model_type})
    own = None if options.architecture else custom_family(custom)
    source = weights.files.get(f"{SOURCE_FOLDER}{CONFIG}")
    first = options.architecture or (files.read_json(source).get("model_type") if source else None)
    names = (
        [options.architecture]
        if options.architecture
        else list(dict.fromkeys([*([first] if first else []), *FAMILIES]))
    )
    losses: dict[str, list[str]] = {}
    families = {model.architecture.name: own} if own else {}  # the others are imported when needed
    for name in families or names:
        family = families.setdefault(name, own or FAMILIES.find(name))
        losses[name] = _not_represented(family, weights.config)
        if not losses[name]:
            return name, family
    nearest = min(losses, key=lambda each: (model.model_type not in families[each].model_types, len(losses[each])))
    rule = f"has fields that {families[nearest].architecture} cannot represent"
    rule += "" if options.architecture else ", nor can another of the architectures known here"
    cure = "Export to megatron, which can hold it, or train a model that Hugging Face can represent"
    raise CheckpointError(problem("The model", Words(" and ".join(losses[nearest])), rule, cure))


def export_notes(model: ModelConfig) -> tuple[str, ...]:
    """What config.json says of a model that is only nearly so, a line each."""
    if not model.architecture.head_transform or model.head_activation == model.activation:
        return ()
    return (
        f"transformers takes {model.activation} in the head over the vocabulary too, as it has one hidden_act; the "
        f"model has {model.head_activation} there, so its logits differ a little (--openai-gelu or "
        "--no-bias-gelu-fusion trains with one activation)",
    )


def _not_represented(family: Family, config: RunConfig) -> list[str]:
    """Fields of the model with their values, or errors, that show that the family's config.json cannot represent it.

    They are those that differ once the config.json is read back; none where it can represent the model.
    """
    fields = architecture_fields(config.model)
    try:
        content = family.config_to_hf(config)
        if any(name in content and content[name] is None for name in ACTIVATION_KEYS):
            return [f"activation {config.model.activation}"]
        values = family.config_from_hf(json.loads(json.dumps(content)))
        read_back = architecture_fields(RunConfig().replace(**values).model)
    except (CheckpointError, ConfigError) as error:
        return [f"activation {config.model.activation}" if "activation" in str(error) else str(error)]
    return [f"{name} {value}" for name, value in fields.items() if read_back.get(name) != value]


def _config_json(weights: Weights, model_type: str, family: Family) -> dict[str, Any]:
    """config.json: the source's where it still describes the model, else that with the config's fields in it.

    Where the source is of another family, or is no Hugging Face folder, it has the config's fields alone.
    """
    fields = family.config_to_hf(weights.config)
    converted = {"architectures": [family.architecture], "model_type": model_type, **fields}
    source_file = weights.files.get(f"{SOURCE_FOLDER}{CONFIG}")
    source = files.read_json(source_file) if source_file else {}
    if source.get("model_type") != model_type:
        return converted
    before = RunConfig().replace(**family.config_from_hf(source))
    if architecture_fields(before.model) == architecture_fields(weights.config.model):
        return source
    return {key: value for key, value in source.items() if key not in ("rope_parameters", *family.aliases)} | converted


FORMAT = Format(
    "huggingface: a folder with config.json and model.safetensors or pytorch_model.bin",
    recognises,
    HuggingFaceOptions,
    read,
    write,
)
