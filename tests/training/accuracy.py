"""Tasks that report something beside their loss."""

from megalith.training.tasks import LanguageModelling


class Reporting(LanguageModelling):
    """Language modelling that reports ten times the loss, and the fraction of tokens that count, with gradients."""

    metric_names = ("tenfold", "counted share")

    def metrics(self, output, batch):
        return {
            "tenfold": (10.0 * output.sum(), 0.5 * len(output)),
            "counted share": (batch["loss_mask"].sum(), batch["loss_mask"].numel()),
        }


class Undeclared(LanguageModelling):
    def metrics(self, output, batch):
        return {"surprise": (output.sum(), 1)}


class Minimised(LanguageModelling):
    def losses(self, output, batch, counts):
        return super().losses(output, batch, counts) | {"accuracy": output.sum()}


class Confused(LanguageModelling):
    metric_names = ("lm loss",)


class Silent(LanguageModelling):
    def losses(self, output, batch, counts):
        return {}


class Changing(LanguageModelling):
    """Micro-batches after the first are counted under another name."""

    calls = 0

    def counts(self, batch):
        self.calls += 1
        return super().counts(batch) if self.calls == 1 else {"other loss": batch["loss_mask"].sum()}
