"""The section `precision`: number formats, determinism, compilation."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class PrecisionConfig:
    """Weights are float32 masters; bf16 and fp16 are formats of computation (docs/architecture.md, section 2)."""

    bf16: bool = option(False, "compute in bfloat16")
    fp16: bool = option(False, "compute in float16 with loss scaling")
    loss_scale: float | None = option(None, "fixed loss scale of fp16 (default: dynamic)", minimum=0.0)
    initial_loss_scale: float = option(2.0**32, "first dynamic loss scale", minimum=0.0)
    min_loss_scale: float = option(1.0, "smallest dynamic loss scale", minimum=0.0)
    loss_scale_window: int = option(1000, "steps without overflow after which the loss scale doubles", minimum=1)
    hysteresis: int = option(2, "overflows until the loss scale halves", minimum=1)
    deterministic_mode: bool = option(False, "bitwise repeatable on accelerators too (always so on the CPU)")
    compile: bool = option(False, "torch.compile each transformer block")

    @property
    def compute_dtype(self) -> str:
        """float32, bfloat16 or float16."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"
