"""Which models of transformers `prepare` takes, and a script's own parsers of models that megalith has no table for.

    check_model(model)                    # ConfigError unless it can be trained here
    kind_of(model)                        # gpt, bert, bert_classification or t5

A parser is registered with Accelerate's own decorator:

    @add_model_config_to_megatron_parser("my-model")  # a part of config.model_type
    def parse(megatron_lm_plugin, model, batch_data):
        megatron_lm_plugin.megatron_lm_default_args |= {"model_type_name": "gpt", "num_layers": model.config.depth, ...}

What it writes acts as other_megatron_args do, which go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import accelerate.utils.dataclasses as accelerate_parsers
from accelerate.utils import add_model_config_to_megatron_parser
from torch import nn

from megalith.checkpoint.formats.huggingface.family import FAMILIES
from megalith.common.errors import ConfigError, problem
from megalith.config.architectures import architecture
from megalith.config.flags.text import Words, fail
from megalith.config.megatron.counts import padded_vocabulary
from megalith.config.run import RunConfig
from megalith.integrations.accelerate.config import AT_RANDOM
from megalith.integrations.accelerate.options import megatron_args

if TYPE_CHECKING:
    from megalith.integrations.accelerate.plugin import MegatronLMPlugin

__all__ = [
    "add_model_config_to_megatron_parser", "check_model", "kind_of", "model_notices", "parsed_config", "run_parser",
    "set_network_size_args",
]  # fmt: skip

HEADS = {  # kind -> ends of the names of transformers' classes
    "gpt": ("ForCausalLM", "LMHeadModel"),
    "bert": ("ForPreTraining", "ForMaskedLM"),
    "bert_classification": ("ForSequenceClassification",),
    "t5": ("ForConditionalGeneration",),
}
PARSED_NAMES = {"orig_vocab_size": "vocab_size", "num_labels": "num_classes", "encoder_seq_length": "seq_length"}
NO_ARGUMENTS = (  # written by parsers for Accelerate's own use
    "model_type_name", "pretraining_flag", "model_return_dict", "return_logits", "original_model_type", "eos_token_id",
    "tokenizer_type",
)  # fmt: skip
OTHER_DROPOUT = {  # model type -> where transformers drops hidden states and megalith does not, or the reverse
    **dict.fromkeys(("t5", "mt5"), "transformers also drops inside MLPs and after the last norms, megalith does not"),
    **dict.fromkeys(("bloom", "falcon"), "transformers does not drop embeddings, megalith does"),
}
NEW_FAMILY = "docs/architecture.md, section 10, shows how a Hugging Face family is added: one table"
Parser = Callable[[Any, nn.Module, Any], Any]


def check_model(model: nn.Module) -> None:
    """Raise ConfigError unless `prepare` can place this model, with everything that cannot be kept of it."""
    config, name = getattr(model, "config", None), f"{type(model).__module__}.{type(model).__qualname__}"
    model_type, what = getattr(config, "model_type", None), "The model given to accelerator.prepare"
    if config is None or model_type is None:
        rule = "must be a model of transformers"
        cure = "Of a wrapper give the model inside (.module, ._orig_mod); custom_model_provider_function takes your own"
        raise ConfigError(problem(what, Words(name), rule, cure))
    if model_type not in FAMILIES.addresses and user_parser(model_type) is not None:
        return
    if model_type not in FAMILIES.addresses:
        rule = f"must be of the families {', '.join(FAMILIES)}"
        cure = f"{NEW_FAMILY}; add_model_config_to_megatron_parser({model_type!r}) names the shape of a model that "
        cure += "starts with random weights"
        raise ConfigError(problem(what, Words(f"{name}, of the type {model_type}"), rule, cure))
    if not type(model).__module__.startswith("transformers."):
        rule = "must be of a class of transformers itself, because the code of another class would not be run"
        cure = "Of adapters give model.merge_and_unload(); custom_model_provider_function takes a model of your own"
        raise ConfigError(problem(what, Words(name), rule, cure))
    if _supported_kind(model) is None:
        kinds = [kind for kind in FAMILIES.find(model_type).model_types if kind in HEADS]
        ends = " or ".join(f"...{end}" for kind in kinds for end in HEADS[kind])
        rule = f"must be {ends}, the heads that megalith has for {model_type}"
        cure = "Load the weights with one of these classes; docs/architecture.md, section 10, shows how a head is added"
        raise ConfigError(problem(what, Words(name), rule, cure))
    fail(_cannot_be_kept(model))


def kind_of(model: nn.Module, config: RunConfig | None = None) -> str:
    """gpt, bert, bert_classification or t5: which model of megalith it becomes. For models that pass `check_model`.

    config: of a model that only a parser describes (`parsed_config`).
    """
    kind = _supported_kind(model)
    return config.model.model_type if kind is None and config is not None else str(kind)


def model_notices(model: nn.Module, config: RunConfig) -> list[str]:
    """A line where hidden states are dropped elsewhere than in transformers. config: of `run_config`."""
    where, rate = OTHER_DROPOUT.get(model.config.model_type), config.model.hidden_dropout
    return [f"with hidden_dropout={rate} {where}; hidden_dropout=0.0 trains without"] if where and rate else []


def user_parser(model_type: str) -> Parser | None:
    """The script's own parser for models of this type; None where there is none, or only Accelerate's."""
    parsers = accelerate_parsers.MODEL_CONFIGS_TO_MEGATRON_PARSERS
    own = {
        name: each for name, each in parsers.items() if getattr(each, "__module__", "") != accelerate_parsers.__name__
    }
    return own.get(model_type) or next((each for name, each in own.items() if name in model_type.lower()), None)


def run_parser(plugin: MegatronLMPlugin, model: nn.Module, batch_data: Mapping[str, Any] | None = None) -> None:
    """Run the script's own parser of this model, if it has one, and keep what it writes into the plugin.

    batch_data: a batch of the loader, for the lengths of samples.
    """
    parser = user_parser(model.config.model_type)
    if parser is None:
        return
    before = dict(plugin.megatron_lm_default_args)
    parser(plugin, model, batch_data)
    written = {
        name: value for name, value in plugin.megatron_lm_default_args.items()
        if name not in NO_ARGUMENTS and not (name in before and before[name] == value)
    }  # fmt: skip
    plugin.parsed_args = {PARSED_NAMES.get(name, name): value for name, value in written.items()}
    if plugin.megatron_lm_default_args.get("pretraining_flag", True):
        plugin.parsed_args.pop("num_classes", None)  # written by Accelerate's parser for models without classes too


def parsed_config(plugin: MegatronLMPlugin, model: nn.Module) -> RunConfig:
    """The config of a model that no family describes, as its parser (`run_parser`) says it is; its weights are random.

    Raises ConfigError where the weights would be kept.
    """
    if plugin.keep_weights and not any(parameter.is_meta for parameter in model.parameters()):
        rule = "must be False for a model that only a parser describes, which does not say where its weights belong"
        raise ConfigError(problem("keep_weights", True, rule, f"Give the weights up: {AT_RANDOM}; or {NEW_FAMILY}"))
    record = architecture(_parsed_kind(plugin))
    values = megatron_args.read(plugin.parsed_args, "megatron_lm_default_args")
    fail(values.problems)
    return RunConfig().replace(**{**record.defaults, **values.values, "model_type": record.name})


def set_network_size_args(plugin: MegatronLMPlugin, model: nn.Module, config: RunConfig) -> None:
    """Complete plugin.megatron_lm_default_args: all fields of the config by Megatron's names, which are the same, and
    those that Accelerate adds.
    """
    m, p, hf_config, kind = config.model, config.parallel, model.config, config.model.model_type
    divisor, processes = m.make_vocab_size_divisible_by, p.tensor_model_parallel_size
    plugin.megatron_lm_default_args |= config.flat() | {
        "model_type_name": "bert" if kind.startswith("bert") else kind,
        "pretraining_flag": kind != "bert_classification",
        "orig_vocab_size": m.vocab_size,
        "padded_vocab_size": padded_vocabulary(m.vocab_size, divisor, processes),
        "model_return_dict": getattr(hf_config, "return_dict", True),
        "num_labels": getattr(hf_config, "num_labels", 2),
        "bert_binary_head": kind == "bert" and not m.bert_no_binary_head,
        "return_logits": plugin.return_logits,
        "eos_token_id": getattr(hf_config, "eos_token_id", None),
        "encoder_seq_length": config.data.seq_length,
        "decoder_seq_length": config.data.decoder_seq_length or config.data.seq_length,
        "ffn_hidden_size": m.ffn_size,
        "kv_channels": m.head_dim,
        "params_dtype": config.precision.compute_dtype,
    }


def _supported_kind(model: nn.Module) -> str | None:
    model_type = model.config.model_type
    kinds = FAMILIES.find(model_type).model_types if model_type in FAMILIES.addresses else ()
    return next((kind for kind in kinds if type(model).__name__.endswith(HEADS.get(kind, ("no such class",)))), None)


def _parsed_kind(plugin: MegatronLMPlugin) -> str:
    """gpt, bert, bert_classification or t5, as a parser has said it."""
    args, known = plugin.megatron_lm_default_args, ("gpt", "bert", "t5")
    name = args.get("model_type_name")
    if name not in known:
        rule = f"must be one of {', '.join(known)}"
        cure = "Write it into megatron_lm_default_args in the parser of the model"
        raise ConfigError(problem("model_type_name", name, rule, cure))
    return "bert_classification" if name == "bert" and not args.get("pretraining_flag", True) else name


def _cannot_be_kept(model: nn.Module) -> Iterator[str]:
    """Fields of a model's config that megalith has no form for, beside those that its family refuses."""
    config = model.config
    embedding, residual = getattr(config, "embd_pdrop", None), getattr(config, "resid_pdrop", None)
    if embedding != residual:
        rule = f"must be resid_pdrop, {residual}, because megalith has one rate for both"
        cure = f"Write model.config.embd_pdrop = {residual} before accelerator.prepare"
        yield problem("config.embd_pdrop", embedding, rule, cure)
    if _supported_kind(model) != "bert_classification":
        return
    problem_type = getattr(config, "problem_type", None)
    if problem_type not in (None, "single_label_classification"):
        rule = "must be single_label_classification: the loss is the cross entropy of classes"
        yield problem("config.problem_type", problem_type, rule, "Leave it out, or train without a plugin")
    elif config.num_labels < 2:
        rule = "must be at least 2, because one label means regression"
        yield problem("config.num_labels", config.num_labels, rule, "Write num_labels=2 or more")
