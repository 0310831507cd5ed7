"""The section `validation`: how the model is judged on data it does not train on."""

from __future__ import annotations

from megalith.config.knobs import knob, section


@section
class ValidationConfig:
    """Validation inside the run, and the test set after it."""

    eval_interval: int = knob(1000, "steps between validations", minimum=1)
    eval_iters: int = knob(100, "global batches per validation; 0 for none", minimum=0)
    skip_train: bool = knob(False, "only validate and test what --load gives")
