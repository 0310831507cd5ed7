"""The section `validation`: how the model is evaluated on data it does not train on."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class ValidationConfig:
    """Validation inside the run, and the test set after it."""

    eval_interval: int | None = option(
        None,
        "steps between validations (default: 1000; with --epochs there is one at the end of each anyway)",
        minimum=1,
    )
    eval_iters: int = option(
        100, "global batches per validation; 0 for none. Files of --valid-data are read whole", minimum=0
    )
    eval_tasks: list[str] = option(
        [], "tasks of `megalith evaluate` to measure at each validation: wikitext103=FILE lambada=FILE ..."
    )
    skip_train: bool = option(False, "only validate and test what --load gives")

    @property
    def interval(self) -> int:
        """Steps between the validations of a run that is not measured in epochs."""
        return self.eval_interval or 1000
