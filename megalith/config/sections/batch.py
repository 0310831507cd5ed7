"""The section `batch`: what one step sees."""

from __future__ import annotations

from megalith.config.knobs import knob, section


@section
class BatchConfig:
    """Batch sizes in samples, and the seed of everything random."""

    micro_batch_size: int | None = knob(None, "samples per forward pass of one data-parallel rank", minimum=1)
    global_batch_size: int | None = knob(
        None, "samples per step over all ranks (default: micro batch x data-parallel ranks)", minimum=1
    )
    rampup_batch_size: list[int] = knob(
        [], "start, increment, samples: grow the global batch in steps over so many samples"
    )
    seed: int = knob(1234, "seed of weights, sample order and dropout", minimum=0)
