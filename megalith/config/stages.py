"""Pipeline stages: how many there are, which process runs them, which layers they have. Whole numbers only, no torch.

p processes run p x v stages. Looping schedules give process r the stages r, r + p, r + 2p ...; V-shaped ones give it r and
2p - 1 - r, so that the first process holds both ends of the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from megalith.config.parameters import sizes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.sections.parallel import ParallelConfig
from megalith.planner.flops import layer_costs

V_SHAPED = ("zbv", "dualpipev")
LOOPING = ("interleaved_1f1b", "zero_bubble")
SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")  # weight gradients come later than those of activations


def schedule_of(parallel: ParallelConfig) -> str:
    """The pipeline schedule by name, `auto` resolved."""
    if parallel.pipeline_schedule != "auto":
        return parallel.pipeline_schedule
    return "interleaved_1f1b" if parallel.num_layers_per_virtual_pipeline_stage else "1f1b"


def stages_per_process(config: RunConfig) -> int:
    """v. Two where an interleaved schedule is named without --num-layers-per-virtual-pipeline-stage."""
    p, schedule = config.parallel, schedule_of(config.parallel)
    if schedule in V_SHAPED:
        return 2
    if schedule not in LOOPING:
        return 1
    if p.num_layers_per_virtual_pipeline_stage:
        return max(
            1,
            (config.model.all_layers or 1)
            // (p.num_layers_per_virtual_pipeline_stage * p.pipeline_model_parallel_size),
        )
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
    """Global numbers of the layers of each stage; a decoder's come after the encoder's."""
    even, length = config.parallel.pipeline_split == "even", config.data.seq_length or 1
    if config.model.decoder_layers and not even:
        counts = partition(
            layer_costs(config.model, length, config.data.decoder_seq_length or length), num_stages(config)
        )
    else:
        first, last = (0.0, 0.0) if even else end_costs(config.model, length)
        counts = split(config.model.all_layers or 1, num_stages(config), first, last)
    firsts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [range(start, start + count) for start, count in zip(firsts, counts, strict=True)]


def split(layers: int, stages: int, first: float, last: float) -> list[int]:
    """Layers of each stage, one at least, such that the most expensive stage is as cheap as can be.

    first, last: what the first stage has besides layers, and the last one, in costs of a layer. Each layer goes to the stage
    that is cheapest by then, which is best for layers of one cost. Where there are no more layers than stages all get one.
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
    """Layers of each stage, one at least, such that the most expensive stage is as cheap as can be; for layers of different costs."""
    sums = [0.0, *itertools.accumulate(costs)]

    @functools.cache
    def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """(cost of the dearest stage, counts) for the layers from `first` on."""
        if stages == 1:
            return sums[-1] - sums[first], (len(costs) - first,)
        ways = ((stop, *best(stop, stages - 1)) for stop in range(first + 1, len(costs) - stages + 2))
        return min((max(sums[stop] - sums[first], cost), (stop - first, *counts)) for stop, cost, counts in ways)

    return list(best(0, stages)[1])


def end_costs(model: ModelConfig, seq_length: int) -> tuple[float, float]:
    """Cost of embedding and of head with loss, each as a multiple of a layer's.

    The head's is that of its matrix product. The embedding's is an estimate, a tenth of it: a look-up computes nothing, but its
    backward pass writes and adds a gradient as large as the head's.
    """
    _, h, heads, vocabulary = sizes(model)
    attention = 2 * h * model.head_dim * (heads + model.num_kv_heads) + 2 * heads * model.head_dim * seq_length / 2
    layer = attention + (3 if model.gated else 2) * h * model.ffn_size
    return 0.1 * vocabulary * h / layer, vocabulary * h / layer


def bubble(schedule: str, processes: int, micro_batches: int, stages_per_process: int = 1) -> float:
    """Ideal idle time of a step over its computing time, for stages of one cost whose transfers cost nothing.

    GPipe and 1F1B: (p - 1) / m. Interleaved (Narayanan et al., 2021, section 2.2): (p - 1) / (v m). Zero-bubble ZB-H1 (Qi et
    al., 2024, section 2.3) with forward, input and weight parts of one cost: (p - 1) / (3 v m). V-shaped schedules have no
    formula of this kind; parallel/pipeline/schedules.py computes theirs by playing the schedule.
    """
    shares = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": stages_per_process, "zero_bubble": 3 * stages_per_process}
    return (processes - 1) / (shares[schedule] * micro_batches)
