"""Rules of the section lora: what cannot work with adapters."""

from __future__ import annotations

from collections.abc import Iterator

from megalith.config.adapters import adaptable_modules, adapted_modules, matches
from megalith.config.flags.text import Problem, Words, field_problem, flag, nearest
from megalith.config.run import RunConfig
from megalith.config.stages import layers_of, num_stages

RANK, ALPHA, DROPOUT, TARGETS = "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"


def lora_problems(config: RunConfig) -> Iterator[Problem]:
    """What in the section lora cannot work, by itself or with the model and its layout."""
    lora, model = config.lora, config.model
    if not lora.lora_rank:
        for name, value in vars(lora).items():
            if name != RANK and value:
                rule = "is for LoRA, which --lora-rank asks for"
                yield field_problem((name, RANK), flag(name), value, rule, "Add --lora-rank 8, or leave it out")
        return
    if lora.lora_alpha == 0.0:
        rule = "must be above 0, or the adapters have no effect"
        yield field_problem((ALPHA,), flag(ALPHA), 0, rule, f"Write {flag(ALPHA)} {lora.lora_rank}, or leave it out")
    if None in (model.num_layers, model.hidden_size, model.num_attention_heads):
        return  # it is said elsewhere
    known = adaptable_modules(model)
    for pattern in lora.lora_target_modules:
        if not any(matches(name, pattern) for name in known):
            ends = list(dict.fromkeys(name.split(".", 2)[-1] for name in known))
            rule = f"must name linear layers of the transformer blocks ({', '.join(ends)})"
            yield field_problem((TARGETS,), flag(TARGETS), pattern, rule, f"Write {nearest(pattern, ends) or ends[0]}")
            return
    targets = adapted_modules(model, lora)
    if lora.lora_dropout and any(name.endswith(("cross_attention.k", "cross_attention.v")) for name in targets):
        rule = "must be 0 where keys and values of cross attention have adapters, as their input is the encoder's"
        cure = f"Write {flag(DROPOUT)} 0, or {flag(TARGETS)} attention.[qkv] out mlp.*"
        yield field_problem((DROPOUT, TARGETS), flag(DROPOUT), lora.lora_dropout, rule, cure)
    if model.vocab_size and model.all_layers >= num_stages(config):
        yield from stage_problems(config)


def stage_problems(config: RunConfig) -> Iterator[Problem]:
    """A pipeline stage without adapters, which would have nothing to train. Needs vocab_size, which moves the cuts."""
    if not config.lora.lora_rank or config.parallel.pipeline_model_parallel_size == 1:
        return
    adapted = {int(name.split(".")[1]) for name in adapted_modules(config.model, config.lora)}
    if without := [layers for layers in layers_of(config) if adapted.isdisjoint(layers)]:
        rule = "must give every pipeline stage an adapter, as each trains what it has"
        found = Words(f"none in layers {', '.join(f'{layers.start} to {layers.stop - 1}' for layers in without)}")
        cure = f"Leave {flag(TARGETS)} out, or use --pipeline-model-parallel-size 1"
        yield field_problem((TARGETS, "pipeline_model_parallel_size"), flag(TARGETS), found, rule, cure)
