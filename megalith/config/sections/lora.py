"""The section `lora`: low-rank adapters that are trained in place of the model's own weights."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class LoraConfig:
    """LoRA (Hu et al., 2021, arXiv 2106.09685): y = W x + alpha / rank B A dropout(x), where A and B alone are trained.

    With DoRA (Liu et al., 2024, arXiv 2402.09353) each row of W + alpha / rank B A is scaled to a trained length.
    docs/lora.md has the commands, and what is not possible.
    """

    lora_rank: int = option(0, "rank of the adapters that are trained; 0: none, the model itself is trained", minimum=0)
    lora_alpha: float | None = option(
        None, "the adapters' output is multiplied by this over the rank (default: the rank)", minimum=0.0
    )
    lora_dropout: float = option(0.0, "dropout of the adapters' input", minimum=0.0)
    lora_target_modules: list[str] = option(
        [],
        "linear layers that get adapters, by name or by the end of it, * for anything: q v 'layers.*.mlp.*' "
        "(default: all of the transformer blocks)",
    )
    use_dora: bool = option(
        False, "DoRA: each output's weights are scaled to a magnitude of its own, which is trained beside the adapters"
    )
    adapter: str | None = option(
        None, "adapters to start from: a LoRA run or a PEFT folder, trained on the model that --load names"
    )

    @property
    def scale(self) -> float:
        """Factor of the adapters' output. Only where there are adapters."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank
