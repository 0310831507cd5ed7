"""From a plugin and the config of a transformers model to a RunConfig."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalith.common.errors import problem
from megalith.config.checks.checks import find_problems
from megalith.config.flags.text import Words, fail, value_text
from megalith.config.flags.values import fields
from megalith.config.identity import BY_SHAPE, NOTED, changes, differences
from megalith.config.megatron import counts
from megalith.config.parameters import parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.data import missing_tokenizer_files
from megalith.config.sections.model import ModelConfig
from megalith.config.sections.parallel import ParallelConfig
from megalith.integrations.accelerate.options.checks import in_plugin_words, plugin_names
from megalith.integrations.accelerate.options.megatron_args import without_dashes

if TYPE_CHECKING:
    from megalith.integrations.accelerate.plugin import MegatronLMPlugin

PRECISIONS = {"no": {}, "fp16": {"fp16": True}, "bf16": {"bf16": True}}
# torch's GradScaler starts with this scale, as Accelerate's users know it: with Megatron's 2**32 a script would skip
# its first sixteen steps.
FIRST_LOSS_SCALE = 2.0**16
ACTIVATIONS = ("openai_gelu", "relu", "squared_relu", "swiglu", "glu_activation")  # one of them is true, or none
INITIAL_VALUES = ("init_method_std", "initializer_factor", "init_method_xavier_uniform")
AT_RANDOM = "MegatronLMPlugin(keep_weights=False) starts with random ones"


def parallel_config(plugin: MegatronLMPlugin, device: Any = "auto") -> ParallelConfig:
    """The layout alone, which is known before the model. device: its kind, or a torch.device."""
    given = {name: value for name, value in plugin.run_fields().items() if fields()[name].section == "parallel"}
    # Layers are divided evenly, as the guide has it; by cost where the script asks for it.
    return ParallelConfig(**{"pipeline_split": "even", "device": getattr(device, "type", device)} | given)


def run_config(
    plugin: MegatronLMPlugin,
    weights_config: RunConfig,
    *,
    num_processes: int,
    micro_batch_size: int,
    seq_length: int | None = None,
    mixed_precision: str | None = None,
    device: Any = "auto",
    keeps_weights: bool | None = None,
    recomputes: bool = False,
) -> RunConfig:
    """The config of a model in the plugin's layout.

    weights_config: of the model given to `prepare` (runtime/load.py: weights_of; parsers.py: parsed_config).
    micro_batch_size: samples. seq_length: tokens of a sample, None where only the model's longest sequence is known.
    mixed_precision: no, fp16 or bf16. device: its kind, or a torch.device.
    keeps_weights: whether the model keeps its weights (None: plugin.keep_weights).
    recomputes: whether gradient checkpointing is enabled in the transformers model; for plugins that ask for nothing.
    Raises ConfigError with everything that cannot work.
    """
    keeps_weights = plugin.keep_weights if keeps_weights is None else keeps_weights
    fail(plugin.problems())  # it may have been changed since it was made
    given = plugin.run_fields()
    of_model = {name: value for name, value in given.items() if fields()[name].section == "model"}
    if any(of_model.get(name) for name in ACTIVATIONS):
        of_model = {name: fields()[name].default for name in ACTIVATIONS} | of_model
    before, model = weights_config.model, _changed(weights_config.model, **of_model)
    problems = [*_precision_problems(given, mixed_precision)]
    problems += _lost_weights(plugin, model, before) if keeps_weights else ()
    length = seq_length or given.get("seq_length") or weights_config.data.seq_length or model.max_position_embeddings
    if model.positions == "relative" and length:  # which has no longest sequence; there it is the usual one
        model = _changed(model, max_position_embeddings=max(model.max_position_embeddings or 0, length))
    parallel = parallel_config(plugin, device)
    data_parallel = max(1, num_processes // parallel.model_parallel_size)
    values = {
        **model.architecture.defaults, "name": model.architecture.name, **given,
        **(PRECISIONS.get(mixed_precision or "no") or {"bf16": weights_config.precision.bf16}),
        "seq_length": length, "micro_batch_size": micro_batch_size,
        "global_batch_size": micro_batch_size * data_parallel * plugin.num_micro_batches,
    }  # fmt: skip
    if not model.decoder_layers:
        values.pop("decoder_seq_length", None)
    if recomputes and not (values["recompute_activations"] or "recompute_granularity" in values):
        values |= {"recompute_granularity": "full", "recompute_method": "uniform"}
    if values.get("fp16"):
        values.setdefault("initial_loss_scale", FIRST_LOSS_SCALE)
    if values.get("tokenizer_type") is None and values.get("vocab_file"):
        merges = values.get("merge_file")
        values["tokenizer_type"] = "GPT2BPETokenizer" if merges else model.architecture.tokenizer_type
    config = RunConfig(model=model).replace(**{name: value for name, value in values.items() if name not in of_model})
    config = dataclasses.replace(config, parallel=parallel)
    for name in missing_tokenizer_files(config.data) if "tokenizer_type" not in given else ():
        rule, cure = "must be given too, because GPT-2's tokenizer is made from both", f"Add {name!r}: FILE"
        problems.append(problem(f"other_megatron_args: {name}", Words("nothing"), rule, cure))
    found = find_problems(config, num_processes, data=False, one_step=True)
    # Datasets come from loaders, and the plugin has checked its own num_micro_batches.
    problems += [
        in_plugin_words(plugin, each) for each in found if not set(each.fields) & {"dataset", "global_batch_size"}
    ]
    fail(problems)
    return config


def config_notices(
    plugin: MegatronLMPlugin,
    config: RunConfig,
    weights_config: RunConfig,
    *,
    keeps_weights: bool = True,
    recomputes: bool = False,
) -> list[str]:
    """Lines on what became of a model: what the plugin changes of it, what of the plugin does nothing for it.

    config: of `run_config`, with the same arguments.
    """
    given, model, before = plugin.run_fields(), config.model, weights_config.model
    named = plugin_names(plugin)
    lines = [without_dashes(line, named) for line in changes(model, before, NOTED)]
    if keeps_weights:
        idle = [name for name in INITIAL_VALUES if name in given]
        lines += [f"{name} has no effect: the model keeps its weights; {AT_RANDOM}" for name in idle]
    if plugin.use_rotary_position_embeddings is False and model.positions == "rope":
        lines.append("use_rotary_position_embeddings=False has no effect: the model has rotary positions")
    if config.precision.bf16 and weights_config.precision.bf16:
        lines.append("the model is in bfloat16: it computes in that, and its weights are trained in float32")
    if recomputes and config.recompute.granularity == "full":
        lines.append("gradient checkpointing of the model is recompute_granularity='full', recompute_method='uniform'")
    return lines


def megatron_log_lines(config: RunConfig, *, keeps_weights: bool = True) -> list[str]:
    """What Megatron's log says of a model: its padded vocabulary, how it is built, and a GPT's parameters by rank."""
    padding, *parameters = counts.report(config)
    model = config.model
    mode = "fine-tuning" if model.model_type == "bert_classification" else "pre-training"
    kind = "bert" if model.model_type.startswith("bert") else model.architecture.name
    lines = [padding, f"Building {kind} model in the {mode} mode."]
    if not keeps_weights:
        lines.append(
            "The Megatron LM model weights are initialized at random in `accelerator.prepare`. Please use "
            "`accelerator.load_checkpoint` to load a pre-trained checkpoint."
        )
    return [*lines, *parameters]


def _changed(model: ModelConfig, **values: Any) -> ModelConfig:
    return RunConfig(model=model).replace(**values).model


def _precision_problems(given: dict[str, Any], mixed_precision: str | None) -> Iterator[str]:
    mixed_precision = str(mixed_precision or "no")
    if mixed_precision not in PRECISIONS:
        yield problem("mixed_precision", mixed_precision, "must be no, fp16 or bf16", "Write mixed_precision='bf16'")
    for name in ("fp16", "bf16"):
        if name in given and given[name] != (mixed_precision == name):
            rule = f"must be as mixed_precision of the Accelerator, {mixed_precision}"
            yield problem(f"other_megatron_args: {name}", given[name], rule, "Say it to the Accelerator alone")


def _lost_weights(plugin: MegatronLMPlugin, model: ModelConfig, before: ModelConfig) -> Iterator[str]:
    """What would make another model than the one whose weights are kept, with the tensors that would not fit."""
    changed = [name for name, _, _ in differences(model, before).incompatible]
    changed += [name for name in BY_SHAPE if getattr(model, name) != getattr(before, name)]
    given = plugin.run_fields()
    for name in (name for name in changed if name in given):
        there, now = getattr(before, name), getattr(model, name)
        texts = _tensor_changes(_changed(before, **{name: now}), before)
        if name in BY_SHAPE and not texts:
            continue  # a longest sequence that is no table
        rule = f"must be {value_text(there)}, as in the model whose weights are kept"
        rule += f", because otherwise {' and '.join(texts)}" if texts else ", which were trained with it"
        called = plugin_names(plugin).get(name, f"other_megatron_args: {name}")
        yield problem(called, now, rule, f"Leave it out, or give the weights up: {AT_RANDOM}")


def _tensor_changes(model: ModelConfig, before: ModelConfig) -> list[str]:
    """Which tensors of one model the other lacks, has more or has in other shapes."""
    new, old = parameter_shapes(model), parameter_shapes(before)
    groups = {
        "would be lost": [name for name in old if name not in new],
        "would have to be invented": [name for name in new if name not in old],
        "would have other shapes": [name for name in old if name in new and old[name] != new[name]],
    }
    return [f"{_listed(names)} {what}" for what, names in groups.items() if names]


def _listed(names: list[str], most: int = 4) -> str:
    """Names of parameters, those of all layers as one."""
    patterns = list(dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in names))
    return ", ".join(patterns[:most]) + " ..." * (len(patterns) > most)
