"""The section `parallel`: how many processes, and what each axis splits."""

from __future__ import annotations

from megalith.config.architectures import ARCHITECTURES
from megalith.config.options import option, section


@section
class ParallelConfig:
    """Degrees of parallelism. World size = tensor x context x pipeline x data; data is the remaining factor."""

    tensor_model_parallel_size: int = option(
        1, "processes among which each layer is split", flags=("--model-parallel-size",), minimum=1
    )
    tensor_parallel_plan: str | None = option(
        None,
        "the plan by which layers are split, another model's or module:name (default: its own)",
        names=tuple(ARCHITECTURES),
    )
    sequence_parallel: bool = option(
        False, "split norms and dropout along the sequence among the tensor-parallel processes"
    )
    pipeline_model_parallel_size: int = option(1, "pipeline stages", minimum=1)
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per chunk of the interleaved pipeline schedules", minimum=1
    )
    pipeline_schedule: str = option(
        "auto",
        "auto: interleaved 1F1B with virtual stages, else 1F1B, or GPipe for fewer micro-batches than stages",
        choices=("auto", "gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "dualpipev"),
    )
    pipeline_split: str = option(
        "cost",
        "layers of the stages: cost (embedding and head count, so that stages take equal time) or even (as Megatron)",
        choices=("cost", "even"),
    )
    context_parallel_size: int = option(1, "processes among which each sequence is split", minimum=1)
    use_distributed_optimizer: bool = option(
        False, "shard gradients and optimizer state over the data-parallel processes (ZeRO-2)"
    )
    data_parallel_sharding: str = option(
        "none",
        "what data parallelism shards: nothing, optimizer state and gradients (ZeRO-2), or parameters too (ZeRO-3)",
        choices=("none", "optimizer", "full"),
    )
    data_parallel_replicas: int = option(
        1, "groups of processes that hold a full copy each (hybrid sharding)", minimum=1
    )
    distributed_backend: str | None = option(
        None, "collective library (default: by device)", choices=("gloo", "nccl", "xccl")
    )
    distributed_timeout_minutes: float = option(
        10, "a collective that waits longer ends the run, naming the rank", minimum=0.01
    )
    device: str = option(
        "auto", "auto: the accelerator if there is one, else the CPU", choices=("auto", "cpu", "cuda", "xpu")
    )

    @property
    def sharding(self) -> str:
        """none, optimizer or full, with --use-distributed-optimizer taken into account."""
        if self.use_distributed_optimizer and self.data_parallel_sharding == "none":
            return "optimizer"
        return self.data_parallel_sharding

    @property
    def model_parallel_size(self) -> int:
        """Processes that together hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def least_processes(self) -> int:
        """Processes of the smallest run in this layout: one copy of the model, with its replicas."""
        return self.model_parallel_size * self.data_parallel_replicas

    @property
    def smallest_world(self) -> int:
        """As least_processes, and two where that is one: the smallest run in which something is parallel."""
        return max(2, self.least_processes)
