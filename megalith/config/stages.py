"""Pipeline stages: how many there are, which process runs them, which layers they have. No torch.

p processes run p x v stages. Looping schedules give process r the stages r, r + p, r + 2p ...; V-shaped ones give it
r and 2p - 1 - r, so that the first process holds both ends of the model. The other schedules have v = 1.
Here a process is numbered by its rank on the pp axis.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from megalith.config.parameters import attention_parameters, has_output_layer, mlp_parameters, sizes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.sections.parallel import ParallelConfig

V_SHAPED = ("zbv", "dualpipev")
LOOPING = ("interleaved_1f1b", "zero_bubble")
SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")  # weight gradients come later than those of activations


def schedule_of(parallel: ParallelConfig) -> str:
    """The pipeline schedule by name, `auto` resolved."""
    if parallel.pipeline_schedule != "auto":
        return parallel.pipeline_schedule
    return "interleaved_1f1b" if parallel.num_layers_per_virtual_pipeline_stage else "1f1b"


def stages_per_process(config: RunConfig) -> int:
    """The v above: two for V-shaped schedules; for looping ones as --num-layers-per-virtual-pipeline-stage says.

    Without that option interleaved_1f1b has two, zero_bubble one.
    """
    p, schedule = config.parallel, schedule_of(config.parallel)
    if schedule in V_SHAPED:
        return 2
    if schedule not in LOOPING:
        return 1
    if p.num_layers_per_virtual_pipeline_stage:
        layers_of_a_round = p.num_layers_per_virtual_pipeline_stage * p.pipeline_model_parallel_size
        return max(1, (config.model.all_layers or 1) // layers_of_a_round)
    return 2 if schedule == "interleaved_1f1b" else 1


def num_stages(config: RunConfig) -> int:
    """Stages of the whole pipeline."""
    return config.parallel.pipeline_model_parallel_size * stages_per_process(config)


def stages_of(config: RunConfig, process: int) -> list[int]:
    """Numbers of the stages that a process of the pipeline runs, in their order in the model."""
    processes = config.parallel.pipeline_model_parallel_size
    if schedule_of(config.parallel) in V_SHAPED:
        return [process, 2 * processes - 1 - process]
    return list(range(process, num_stages(config), processes))


def layers_of(config: RunConfig) -> list[range]:
    """Global numbers of the layers of each stage, from 0; a decoder's come after the encoder's."""
    even, length = config.parallel.pipeline_split == "even", config.data.seq_length or 1
    record = config.model.architecture
    if record.layer_costs and not even:
        costs = record.find("layer_costs")(config.model, length, config.data.decoder_seq_length or length)
        counts = partition(costs, num_stages(config))
    else:
        first, last = (0.0, 0.0) if even else end_costs(config.model, length)
        counts = split(config.model.all_layers or 1, num_stages(config), first, last)
    firsts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [range(start, start + count) for start, count in zip(firsts, counts, strict=True)]


def split(layers: int, stages: int, first: float, last: float) -> list[int]:
    """Number of layers of each stage, one at least, such that the most expensive stage is as cheap as can be.

    first, last: what the first stage has besides layers, and the last one, in costs of a layer. Each layer goes to the
    stage that is cheapest by then, which is best for layers of one cost. Fewer layers than stages are refused before
    (config/checks/parallel.py).
    """
    costs = [1.0] * stages
    costs[0] += first
    costs[-1] += last
    counts = [1] * stages
    for _ in range(layers - stages):
        cheapest = costs.index(min(costs))
        costs[cheapest] += 1.0
        counts[cheapest] += 1
    return counts


def partition(costs: Sequence[float], stages: int) -> list[int]:
    """Number of layers of each stage as of `split`, for layers of different costs, which include the ends'."""
    sums = [0.0, *itertools.accumulate(costs)]

    @functools.cache
    def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """(cost of the most expensive stage, counts) for the layers from `first` on."""
        if stages == 1:
            return sums[-1] - sums[first], (len(costs) - first,)
        ways = ((stop, *best(stop, stages - 1)) for stop in range(first + 1, len(costs) - stages + 2))
        return min((max(sums[stop] - sums[first], cost), (stop - first, *counts)) for stop, cost, counts in ways)

    return list(best(0, stages)[1])


def end_costs(model: ModelConfig, seq_length: int) -> tuple[float, float]:
    """Cost of embedding and of head with loss, each as a multiple of a layer's (multiplications per token, forward).

    Attention counts as causal, for BERT too. The head's cost is that of its matrix product. The embedding's is an
    estimate, a tenth of it: a look-up computes nothing, but its backward pass writes and adds a gradient as large as
    the head's.
    """
    _, h, heads, vocabulary = sizes(model)
    attention = 2 * h * model.head_dim * (heads + model.num_kv_heads) + 2 * heads * model.head_dim * seq_length / 2
    layer = attention + (3 if model.gated else 2) * h * model.ffn_size
    head = vocabulary * h / layer if has_output_layer(model) else 0.0
    return 0.1 * vocabulary * h / layer, head


def keys_seen(seq_length: int, window: int | None, causal_half: bool) -> float:
    """Keys that a query of one layer is multiplied with, on average: the window, or (half) what exists of it."""
    widest = min(window or seq_length, seq_length)
    return widest - widest * widest / (2 * seq_length) if causal_half else widest


def with_neighbors(
    model: ModelConfig, source: int, target: int, causal_half: bool = True, look_up: float = 0.1
) -> list[float]:
    """As `two_stacks`, of Retro, by layer; `source`: tokens of the text.

    The layer that encodes neighbours costs most: with Megatron's sizes they have 4 tokens for each of the text.
    """
    layers, h, heads, vocabulary = sizes(model)
    attention, mlp, width = attention_parameters(model), mlp_parameters(model), 2 * heads * model.head_dim
    queries, keys = (2 * h * model.head_dim * number for number in (heads, model.num_kv_heads))  # q and out; k and v
    chunk, length = model.retro_gpt_chunk_length, model.retrieved_length
    chunks, per_chunk = source // chunk, model.retro_num_neighbors * length
    tokens = chunks * per_chunk  # of all neighbours
    cross = source * queries + tokens * keys + width * chunks * chunk * per_chunk
    encoder = model.retro_encoder_layers * tokens * (attention + mlp + width * length)
    encoder += tokens * queries + source * keys + width * tokens * chunk
    costs = [
        source * (attention + mlp + width * keys_seen(source, model.window(number), causal_half))
        + cross * (number in model.retrieval_layers)
        for number in range(layers)
    ]
    costs[0] += look_up * source * vocabulary * h
    costs[model.retrieval_layers[0]] += encoder + look_up * source * vocabulary * h
    costs[-1] += source * vocabulary * h
    return costs


def two_stacks(
    model: ModelConfig, source: int, target: int, causal_half: bool = True, look_up: float = 0.1
) -> list[float]:
    """Multiplications of a forward pass of one sample by layer: the encoder's, then the decoder's.

    source, target: tokens of the encoder's and of the decoder's sequence.
    causal_half: whether the decoder's self-attention counts half of the keys.
    The output layer counts with the last layer. The embeddings count with the first of each stack: a look-up computes
    nothing, but its backward pass writes and adds a gradient as large as the output layer's, by estimate `look_up` of
    its cost.
    """
    layers, h, heads, vocabulary = sizes(model)
    attention, mlp, width = attention_parameters(model), mlp_parameters(model), 2 * heads * model.head_dim
    cross_kv = 2 * h * model.num_kv_heads * model.head_dim  # for each token of the encoder's output
    encoder = source * (attention + mlp + width * source)
    keys = target / 2 if causal_half else target
    decoder = target * (2 * attention - cross_kv + mlp + width * (keys + source)) + source * cross_kv
    costs = [float(encoder)] * layers + [float(decoder)] * model.decoder_layers
    costs[0] += look_up * source * vocabulary * h
    costs[layers] += look_up * target * vocabulary * h
    costs[-1] += target * vocabulary * h
    return costs
