"""The section `optimizer`: how gradients change weights."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class OptimizerConfig:
    """AdamW (decoupled weight decay: Loshchilov and Hutter, 2019) or SGD (decay added to the gradient); clipping."""

    optimizer: str = option("adam", "adam (AdamW), sgd, or module:name of your own", names=("adam", "adamw", "sgd"))
    lr: float | None = option(None, "peak learning rate", minimum=0.0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", minimum=0.0)
    weight_decay: float = option(0.01, "weight decay of matrices (biases and norms have none)", minimum=0.0)
    start_weight_decay: float | None = option(None, "weight decay at the start, where it grows", minimum=0.0)
    end_weight_decay: float | None = option(None, "weight decay at the end, where it grows", minimum=0.0)
    weight_decay_incr_style: str = option(
        "constant", "how weight decay grows over the run", choices=("constant", "linear", "cosine")
    )
    clip_grad: float = option(1.0, "largest global gradient norm; 0 leaves gradients alone", minimum=0.0)
    adam_beta1: float = option(0.9, "decay of the first moment", minimum=0.0)
    adam_beta2: float = option(0.999, "decay of the second moment", minimum=0.0)
    adam_eps: float = option(1e-8, "added to the root of the second moment", minimum=0.0)
    sgd_momentum: float = option(0.9, "momentum of SGD", minimum=0.0)
