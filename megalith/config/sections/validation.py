"""The section `validation`: how the model is evaluated on data it does not train on."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class ValidationConfig:
    """Validation inside the run, and the test set after it."""

    eval_interval: int = option(1000, "steps between validations", minimum=1)
    eval_iters: int = option(100, "global batches per validation; 0 for none", minimum=0)
    skip_train: bool = option(False, "only validate and test what --load gives")
