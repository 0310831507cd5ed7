"""What a run takes from the checkpoint of --load (config, tokenizer), and its resolved config as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.config.batch_math import run_summary
from megalith.config.flags.loading import TOKENIZER, from_yaml, to_yaml
from megalith.config.flags.values import fields
from megalith.config.megatron import counts as megatron_counts
from megalith.config.parameters import parameter_count
from megalith.config.run import RunConfig


def checkpoint_config(values: Mapping[str, Any]) -> str:
    """The YAML text of the config of what --load names, in whatever format."""
    from megalith.checkpoint.store import facts  # here, because few runs need them
    from megalith.checkpoint.store import folder as folders

    if folders.is_megalith(values["load"]):
        return facts.read_config(folders.find(values["load"], values.get("ckpt_step")))
    return to_yaml(_foreign(values).config)


def checkpoint_tokenizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the tokenizer of --load is made from: its files, or at least its type; {} where neither is known."""
    from megalith.checkpoint.store import folder as folders  # here, because few runs need them
    from megalith.data.tokenizers.tokenizer import saved_options

    if folders.is_megalith(values["load"]):
        stored = folders.find(values["load"], values.get("ckpt_step")) / "tokenizer"
        data, folder = from_yaml(checkpoint_config(values)).data, stored if stored.is_dir() else None
    else:
        weights = _foreign(values)
        data, folder = weights.config.data, weights.tokenizer
    if folder is not None:
        return saved_options(folder, data)
    return {"tokenizer_type": data.tokenizer_type} if data.tokenizer_type else {}


def _foreign(values: Mapping[str, Any]) -> Any:
    """The Weights of another program's checkpoint; the command's values count where its files state nothing."""
    from megalith.checkpoint.formats import foreign  # here, because it imports torch
    from megalith.data.tokenizers.given import TokenizerOverride

    typed = {name: value for name, value in values.items() if name in fields()}
    given = TokenizerOverride(None, {name: typed[name] for name in TOKENIZER if typed.get(name) is not None})
    vocab_size, kind = typed.get("vocab_size"), typed.get("tokenizer_type")
    rows = megatron_counts.embedding_rows(vocab_size, kind) if vocab_size else None
    model = {name: value for name, value in typed.items() if fields()[name].section == "model"}
    config = RunConfig().replace(**typed)
    return foreign.read(
        values["load"],
        foreign.read_options(
            config, vocabulary_size=lambda data: rows or given.vocab_size(data), assumed=model, replicas="first"
        ),
    )


def describe(config: RunConfig, world_size: int, how_much: str) -> str:
    """The resolved config as YAML, below comment lines of derived numbers. how_much: 'changed', 'all' or 'none'."""
    if how_much == "none":
        return ""
    lines = [run_summary(config, world_size)]
    if config.model.vocab_size:
        padded = config.replace(
            vocab_size=megatron_counts.embedding_rows(config.model.vocab_size, config.data.tokenizer_type)
        )
        lines += [
            f"{parameter_count(padded.model):,} parameters, activation {config.model.activation}",
            *megatron_counts.report(padded),
        ]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(config, changed_only=how_much == "changed")
