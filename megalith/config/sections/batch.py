"""The section `batch`: what one step sees."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class BatchConfig:
    """Batch sizes in samples, and the seed of everything random."""

    micro_batch_size: int | None = option(None, "samples per forward pass of one data-parallel rank", minimum=1)
    global_batch_size: int | None = option(
        None, "samples per step over all ranks (default: micro batch x data-parallel ranks)", minimum=1
    )
    rampup_batch_size: list[int] = option(
        [], "start, increment, samples: grow the global batch in steps over so many samples"
    )
    seed: int = option(1234, "seed of weights, sample order and dropout", minimum=0)
