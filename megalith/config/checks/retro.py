"""What a Retro cannot work with."""

from __future__ import annotations

from collections.abc import Iterator

from megalith.config.checks.architectures import mismatched_training_data, unsupported_forms
from megalith.config.flags.text import Problem, Words, around, field_problem, flag, multiples
from megalith.config.run import RunConfig

POSITIONS = ("learned_absolute", "rope", "none")
REFUSED = {  # field -> why
    "reset_attention_mask": "has no meaning for Retro, whose tokens read what was found for the chunk before them, "
    "of whatever document that is",
    "apply_residual_connection_post_layernorm": "is not for Retro, which is a GPT where no neighbour was found",
}


def retro_problems(config: RunConfig) -> Iterator[Problem]:
    """What a Retro cannot work with."""
    m, p, length = config.model, config.parallel, config.data.seq_length
    yield from unsupported_forms(config, "retro")
    yield from mismatched_training_data(config)
    values = config.flat()
    for name, rule in REFUSED.items():
        if values[name]:
            yield field_problem((name,), flag(name), True, rule, "Leave it out")
    if m.positions not in POSITIONS:
        rule = f"must be one of {', '.join(POSITIONS)} for Retro, as neighbours have no place in the text"
        cure = "Write --position-embedding-type rope"
        yield field_problem(("position_embedding_type",), "--position-embedding-type", m.positions, rule, cure)
    yield from _layers(config)
    chunk = m.retro_gpt_chunk_length
    about: tuple[str, ...]
    if length and length % chunk:
        about = ("seq_length", "retro_gpt_chunk_length")
        rule = f"must be a multiple of {flag(about[1])}, {chunk}"
        cure = f"Write --seq-length {around(length, multiples(length, chunk))}"
        yield field_problem(about, "--seq-length", length, rule, cure)
    longest, retrieved = m.max_position_embeddings, m.retrieved_length
    if m.positions == "learned_absolute" and longest and retrieved > longest:
        about = ("max_position_embeddings", "retro_num_retrieved_chunks", "retro_gpt_chunk_length")
        rule = f"must be at least {retrieved}, the tokens of a neighbour with what follows it"
        yield field_problem(about, flag(about[0]), longest, rule, f"Write {flag(about[0])} {retrieved}")
    if p.context_parallel_size > 1:
        about, rule = ("context_parallel_size",), "must be 1 for Retro, whose chunks are not split among processes"
        yield field_problem(about, flag(about[0]), p.context_parallel_size, rule, "Leave it out")
    if p.sequence_parallel and retrieved % p.tensor_model_parallel_size:
        about = ("tensor_model_parallel_size", "retro_num_retrieved_chunks", "retro_gpt_chunk_length")
        rule = f"must divide the {retrieved} tokens of a neighbour, which --sequence-parallel splits"
        cure = "Use fewer tensor-parallel processes, or leave out --sequence-parallel"
        yield field_problem(about, flag(about[0]), p.tensor_model_parallel_size, rule, cure)
    if config.finetuning.retro_freeze:
        yield from _freezing(config)
    if config.lora.lora_rank and config.lora.lora_dropout:
        about, rule = ("lora_dropout", "lora_rank"), "must be 0 for Retro, whose adapters read texts and neighbours"
        yield field_problem(about, flag(about[0]), config.lora.lora_dropout, rule, "Leave it out")


def _freezing(config: RunConfig) -> Iterator[Problem]:
    """What a GPT that is frozen excludes."""
    name = "retro_freeze"
    about: tuple[str, ...]
    if config.checkpoint.load is None and config.finetuning.pretrained_checkpoint is None:
        rule, cure = "needs weights to freeze, because drawn ones say nothing", "Write --pretrained-checkpoint GPT"
        yield field_problem((name, "pretrained_checkpoint"), flag(name), True, rule, cure)
    if config.lora.lora_rank:
        rule = "excludes --lora-rank, whose adapters change what the GPT computes"
        yield field_problem((name, "lora_rank"), flag(name), True, rule, "Leave out one of the two")
    if config.data.retro_no_retrieval and not config.validation.skip_train:
        rule = "excludes --retro-no-retrieval, because nothing that is trained would be used"
        yield field_problem((name, "retro_no_retrieval"), flag(name), True, rule, "Leave out one of the two")
    if (size := config.parallel.pipeline_model_parallel_size) > 1:
        about, rule = ("pipeline_model_parallel_size", name), f"must be 1 with {flag(name)}"
        rule += ", because stages before the first retrieval layer would have no gradient to compute"
        yield field_problem(about, flag(about[0]), size, rule, "Use tensor parallelism, or leave one of the two out")


def _layers(config: RunConfig) -> Iterator[Problem]:
    """The layers with chunked cross-attention."""
    m, name = config.model, "retro_layer_numbers"
    numbers, layers = m.retro_layer_numbers, m.num_layers
    if layers is None:
        return
    if not m.retrieval_layers:
        rule = f"must be given, because the usual ones begin with the 6th, and the model has {layers}"
        cure = f"Write {flag(name)} {(layers + 1) // 2}"
        yield field_problem((name, "num_layers"), flag(name), Words("none"), rule, cure)
    elif sorted({number for number in numbers if 1 <= number <= layers}) != numbers:
        rule = f"must be numbers of layers from 1 to {layers}, each once and in order"
        cure = f"Write {flag(name)} {' '.join(map(str, range((layers + 1) // 2, layers + 1, 3)))}"
        yield field_problem((name, "num_layers"), flag(name), numbers, rule, cure)
