"""The factor of a float16 loss that keeps small gradients from vanishing. Python numbers only, no tensors."""

from __future__ import annotations

from megalith.common.errors import ConfigError, problem
from megalith.config.sections.precision import PrecisionConfig


class StaticLossScale:
    """A fixed scale; 1 where the format needs none (float32, bfloat16)."""

    def __init__(self, scale: float = 1.0):
        self.scale = float(scale)

    @property
    def inverse(self) -> float:
        """1 / scale in float64, the factor of the gradients."""
        return 1.0 / self.scale

    @property
    def at_minimum(self) -> bool:
        """Whether the scale cannot become smaller; a fixed one never does."""
        return True

    def update(self, found_inf: bool) -> None:
        """Note whether a step's gradients overflowed (on any rank). A fixed scale stays."""

    def state_dict(self) -> dict[str, float | int]:
        """What a checkpoint keeps."""
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Nothing to load: a fixed scale is that of the flags, not of the checkpoint."""


class DynamicLossScale(StaticLossScale):
    """Halves when gradients overflow, doubles after `window` steps without.

    The first `hysteresis` - 1 overflows do not halve it. As in Megatron, this tolerance is restored only when the scale
    grows: after a halving every further overflow halves again, which finds a working scale fast.
    """

    def __init__(self, initial: float = 2.0**32, minimum: float = 1.0, window: int = 1000, hysteresis: int = 2):
        self.scale = float(initial)
        self.minimum = float(minimum)
        self.window = window
        self.hysteresis = hysteresis
        self.growth_tracker = 0
        self.hysteresis_tracker = hysteresis

    @property
    def at_minimum(self) -> bool:
        """Whether the scale is at its minimum."""
        return self.scale <= self.minimum

    def update(self, found_inf: bool) -> None:
        """Note whether a step's gradients overflowed (on any rank), and set the scale of the next step."""
        if found_inf:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = max(self.scale * 0.5, self.minimum)
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.window:
            self.growth_tracker = 0
            self.hysteresis_tracker = self.hysteresis
            self.scale *= 2.0

    def state_dict(self) -> dict[str, float | int]:
        """What a checkpoint keeps (Megatron's names)."""
        return {
            "scale": self.scale,
            "growth_tracker": self.growth_tracker,
            "hysteresis_tracker": self.hysteresis_tracker,
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restore what `state_dict()` returned. That of a static scale has no trackers, which then start anew."""
        self.scale = float(state["scale"])
        self.growth_tracker = int(state.get("growth_tracker", 0))
        self.hysteresis_tracker = int(state.get("hysteresis_tracker", self.hysteresis))


def build_loss_scale(config: PrecisionConfig) -> StaticLossScale:
    """The scale of the section `precision`: fixed with --loss-scale, dynamic with --fp16 alone, 1 otherwise.

    Raises ConfigError for scales that cannot work.
    """
    if not config.fp16:
        return StaticLossScale(1.0)
    if config.loss_scale is not None:
        if config.loss_scale <= 0.0:
            cure = "Leave it out for a dynamic scale"
            raise ConfigError(problem("--loss-scale", config.loss_scale, "must be positive", cure))
        return StaticLossScale(config.loss_scale)
    if not 0.0 < config.min_loss_scale <= config.initial_loss_scale:
        found = (config.min_loss_scale, config.initial_loss_scale)
        rule = "must be positive, and the first at most the second"
        raise ConfigError(problem("--min-loss-scale and --initial-loss-scale", found, rule, "Lower --min-loss-scale"))
    return DynamicLossScale(
        config.initial_loss_scale, config.min_loss_scale, config.loss_scale_window, config.hysteresis
    )
