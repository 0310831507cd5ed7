"""Bytes of activations that training keeps for the backward pass, by tensor; docs/activation_memory.md derives them.

For GPT on one rank, one micro-batch, uncompiled, on the CPU's kernels (the only ones on which they were measured), and
without context parallelism. Parameters, gradients and temporary tensors are not included.
"""

from __future__ import annotations

from megalith.common.errors import ConfigError, problem
from megalith.config.run import RunConfig
from megalith.config.sections.data import INSTRUCTIONS

# Tensors of the MLP's inner width that are kept for the activation and the product with `up` (not the input of `down`).
INNER = {"gelu": 1, "gelu_tanh": 1, "squared_relu": 1, "swiglu": 3, "geglu": 3, "geglu_tanh": 3, "reglu": 2, "liglu": 2}
FLOAT = 4  # statistics, softmax and RMSNorm are float32 in every format


def activation_bytes(config: RunConfig, layers: int | None = None, ends: bool = True) -> int:
    """Bytes that one micro-batch keeps on one rank.

    layers: how many layers the rank holds (default: all). ends: whether it holds embedding and head.
    A pipeline holds as many times this as there are micro-batches in flight.
    """
    if config.model.architecture.activations is None:
        rule = "must be GPT, the only model whose activations are computed"
        cure = "Measure a step; the layers cost what a GPT's of their size do"
        raise ConfigError(problem("The model", config.model.model_type, rule, cure))
    count = config.model.num_layers if layers is None else layers
    recompute, group = config.recompute, config.recompute.recompute_num_layers
    layer = sum(layer_terms(config).values())
    layer_input = _tokens(config) * _element(config) * config.model.hidden_size // _sequence_ways(config)
    if recompute.granularity != "full":
        kept = count * layer
    elif recompute.recompute_method == "block":
        kept = min(group, count) * layer_input + max(0, count - group) * layer
    else:
        kept = -(-count // group) * layer_input
    return kept + (sum(config.model.architecture.find("activations")(config).values()) if ends else 0)


def layer_terms(config: RunConfig) -> dict[str, int]:
    """Bytes of each tensor that one layer keeps, under selective recomputation or none."""
    m, tokens, element = config.model, _tokens(config), _element(config)
    tp, sequence = config.parallel.tensor_model_parallel_size, _sequence_ways(config)
    stream = tokens * m.hidden_size // sequence  # elements of a tensor of the residual stream
    inner = tokens * m.ffn_size // tp
    terms = {f"attention_norm.{name}": size for name, size in norm_terms(config).items()}
    terms |= {"attention.input": element * stream}
    terms |= attention_terms(config)
    if m.two_norms:  # with one, the MLP keeps the input that attention keeps
        shared = {"input"} if m.parallel_attn and m.norm == "layernorm" else set()  # of both norms
        terms |= {f"mlp_norm.{name}": size for name, size in norm_terms(config).items() if name not in shared}
        terms |= {"mlp.input": element * stream}
    terms |= {"mlp.activation": INNER[m.activation] * element * inner, "mlp.down.input": element * inner}
    if m.hidden_dropout:
        terms |= {"attention_dropout.mask": stream, "mlp_dropout.mask": stream}
    return terms


def norm_terms(config: RunConfig) -> dict[str, int]:
    """Bytes of each tensor that one norm of the residual stream keeps."""
    rows, element = _tokens(config) // _sequence_ways(config), _element(config)
    stream = rows * config.model.hidden_size
    if config.model.norm != "layernorm":  # made of elementary operations: the input and the normed one, both in float32
        return {"input": FLOAT * stream, "normed": FLOAT * stream, "statistics": FLOAT * rows}
    return {"input": element * stream, "statistics": 2 * element * rows}


def attention_terms(config: RunConfig) -> dict[str, int]:
    """Bytes of each tensor that head norms, core attention, and the projection after it keep."""
    m, tokens, element, tp = config.model, _tokens(config), _element(config), config.parallel.tensor_model_parallel_size
    heads, kv_heads = m.num_attention_heads // tp, max(1, m.num_kv_heads // tp)
    queries, keys = tokens * heads * m.head_dim, tokens * kv_heads * m.head_dim
    terms = {}
    if m.qk_layernorm:  # RMSNorm of each head, as in norm_terms
        terms["head_norms"] = FLOAT * (2 * (queries + keys) + tokens * (heads + kv_heads))
    path = attention_path(config)
    if config.recompute.granularity == "selective":
        terms |= {"core.query": element * queries, "core.key_value": 2 * element * keys}
    else:  # key and value heads are repeated for the queries of their group
        terms |= {"core.query": element * queries, "core.key_value": 2 * element * queries}
        if path == "explicit":
            terms |= score_terms(config)
        elif path == "fused":
            terms |= {"core.log_sum": FLOAT * tokens * heads}
            # The output is laid out as q; rotated queries are contiguous by head, so that the projection copies.
            terms |= {"core.output": element * queries} if m.positions == "rope" else {}
    return terms | {"attention.out.input": element * queries}


def score_terms(config: RunConfig) -> dict[str, int]:
    """The s x s terms of explicit attention: softmax in float32, with dropout a mask and the weights after it.

    Those weights are in the format of computation.
    """
    m, tp = config.model, config.parallel.tensor_model_parallel_size
    scores = _tokens(config) * config.data.seq_length * m.num_attention_heads // tp
    terms = {"core.softmax": FLOAT * scores}
    if m.attention_dropout:
        return terms | {"core.dropout_mask": scores, "core.weights": _element(config) * scores}
    return terms | ({"core.weights": 2 * scores} if _element(config) == 2 else {})


def end_terms(config: RunConfig) -> dict[str, int]:
    """Bytes of each tensor that embedding, final norm and loss keep."""
    m, tokens, element, tp = config.model, _tokens(config), _element(config), config.parallel.tensor_model_parallel_size
    # Split by vocabulary: local ids, and a mask of those that this rank holds.
    terms = {"embedding.ids": 8 * tokens if tp == 1 else 9 * tokens}
    if m.hidden_dropout:
        terms["embedding_dropout.mask"] = tokens * m.hidden_size // _sequence_ways(config)
    if m.positions == "rope":
        terms["rotary_tables"] = FLOAT * tokens * (int(m.head_dim * m.rotary_percent) // 2 * 2)
    if m.embed_layernorm:
        terms |= {f"embedding_norm.{name}": size for name, size in norm_terms(config).items()}
    terms |= {f"final_norm.{name}": size for name, size in norm_terms(config).items()}
    rows = -(-m.vocab_size // tp)
    return terms | {
        "loss.hidden_gradient": element * tokens * m.hidden_size,
        "loss.weight_gradient": FLOAT * rows * m.hidden_size,
    }


def attention_path(config: RunConfig) -> str:
    """Kind of core attention on the CPU: explicit, fused, or blocks (fused on blocks of queries, each recomputed)."""
    m, data = config.model, config.data
    if m.attention_backend in ("explicit", "unfused", "local") or m.attention_dropout:
        return "explicit"
    documents = data.reset_attention_mask or (data.dataset in INSTRUCTIONS and data.packing)
    return "blocks" if m.positions == "alibi" or m.sliding_window or documents else "fused"


def _tokens(config: RunConfig) -> int:
    return config.batch.micro_batch_size * config.data.seq_length


def _element(config: RunConfig) -> int:
    return 4 if config.precision.compute_dtype == "float32" else 2


def _sequence_ways(config: RunConfig) -> int:
    """Among how many ranks the residual stream is split."""
    return config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
