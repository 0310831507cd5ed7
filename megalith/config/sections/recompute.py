"""The section `recompute`: activations that are recomputed instead of kept."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class RecomputeConfig:
    """Activation recomputation (Korthikanti et al., 2022, arXiv 2205.05198)."""

    recompute_activations: bool = option(False, "recompute core attention: same as --recompute-granularity selective")
    recompute_granularity: str | None = option(
        None, "selective: core attention; full: whole layers", choices=("selective", "full")
    )
    recompute_method: str | None = option(
        None, "full: uniform groups of layers, or the first layers of each stage", choices=("uniform", "block")
    )
    recompute_num_layers: int = option(1, "layers per uniform group, or layers recomputed per stage", minimum=1)

    @property
    def granularity(self) -> str | None:
        """None, selective or full."""
        return self.recompute_granularity or ("selective" if self.recompute_activations else None)
