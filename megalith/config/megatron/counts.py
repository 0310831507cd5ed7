"""Parameters and vocabulary as Megatron counts them, for comparing logs: Megatron pads the vocabulary, megalith not.

A count is of one tensor-parallel rank of one pipeline process. Megatron's numbers come out where its layers are split
as here: evenly (--pipeline-split even).
"""

from __future__ import annotations

from megalith.config.parameters import sizes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.stages import layers_of, num_stages, stages_of

NUMERIC_TOKENIZERS = ("NullTokenizer", "NullMultimodalTokenizer")  # tokenizers of texts that are numbers


def padded_vocabulary(size: int, divisible_by: int, tensor: int) -> int:
    """The size that Megatron pads a vocabulary to: the next multiple of divisible_by x tensor-parallel ranks."""
    multiple = divisible_by * tensor
    return -(-size // multiple) * multiple


def embedding_rows(vocab_size: int, tokenizer_type: str | None) -> int:
    """Rows of the embedding that --vocab-size means; numeric tokenizers have one more, which ends documents."""
    return vocab_size + (tokenizer_type in NUMERIC_TOKENIZERS)


def vocab_size_of_rows(rows: int, tokenizer_type: str | None) -> int:
    """The --vocab-size that means so many rows: the reverse of `embedding_rows`."""
    return rows - (tokenizer_type in NUMERIC_TOKENIZERS)


def layer_parameters(model: ModelConfig, tensor: int) -> int:
    """Parameters of one GPT layer on one of `tensor` ranks: what is not split is counted on each."""
    _, h, heads, _ = sizes(model)
    queries = heads * model.head_dim // tensor
    keys = max(model.num_kv_heads // tensor, 1) * model.head_dim  # fewer heads than ranks: one head on each
    inner, columns = model.ffn_size // tensor, 2 if model.gated else 1
    norm = 2 * h if model.norm == "layernorm" else h
    count = 2 * h * (queries + keys) + (columns + 1) * h * inner + 2 * norm
    count += 2 * model.head_dim if model.qk_layernorm else 0
    count += queries + 2 * keys if model.add_bias_linear or model.add_qkv_bias else 0
    return count + (h + columns * inner + h if model.add_bias_linear else 0)


def rank_parameters(config: RunConfig, process: int) -> int:
    """Parameters of a tensor-parallel rank of pipeline process `process` of a GPT.

    A tied head is a copy where it is not beside the embedding.
    """
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    _, h, _, vocabulary = sizes(model)
    words = padded_vocabulary(vocabulary, model.make_vocab_size_divisible_by, tensor) // tensor * h
    layers, last, total = layers_of(config), num_stages(config) - 1, 0
    for stage in stages_of(config, process):
        total += len(layers[stage]) * layer_parameters(model, tensor)
        if stage == 0:
            total += words + ((model.max_position_embeddings or 0) * h if model.positions == "learned_absolute" else 0)
        if stage == last:
            total += 2 * h if model.norm == "layernorm" else h
            total += words if last > 0 or model.untie_embeddings_and_output_weights else 0
    return total


def report(config: RunConfig) -> list[str]:
    """The lines of Megatron's log on vocabulary and, of a GPT, on parameters. Needs vocab_size."""
    model, p = config.model, config.parallel
    vocabulary = sizes(model)[3]
    padded = padded_vocabulary(vocabulary, model.make_vocab_size_divisible_by, p.tensor_model_parallel_size)
    lines = [f" > padded vocab (size: {vocabulary}) with {padded - vocabulary} dummy tokens (new size: {padded})"]
    for process in range(p.pipeline_model_parallel_size if model.architecture.rank_parameters else 0):
        number = model.architecture.find("rank_parameters")(config, process)
        lines += [
            f" > number of parameters on (tensor, pipeline) model parallel rank ({tensor}, {process}): {number}"
            for tensor in range(p.tensor_model_parallel_size)
        ]
    return lines
