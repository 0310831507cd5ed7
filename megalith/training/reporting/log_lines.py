"""Lines on standard output: Megatron's, character for character, because people parse them, and fields of speed."""

from __future__ import annotations

import math

from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord, perplexity, print_lines
from megalith.training.reporting.speed import Speed


class LogLines(Callback):
    """A line of averages every `--log-interval` steps, and one with losses and perplexities after every validation."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_start(self, run: RunInfo) -> None:
        """Nothing has been averaged yet."""
        self.records = []

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Collect; print where the interval ends."""
        if not run.writes:
            return
        self.records.append(record)
        if record.step % run.config.logging.log_interval == 0:
            print_lines(step_line(run, self.records) + speed_fields(run, self.records))
            self.records = []

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """Print between two rules, as Megatron does."""
        if run.writes:
            line = validation_line(record)
            rule = "-" * (len(line) + 1)
            print_lines(rule, line, rule)


def step_line(run: RunInfo, records: list[StepRecord]) -> str:
    """Megatron's line on some steps.

    Losses are averaged over those that were not skipped, metrics over all; the rest is that of the last step.
    """
    last = records[-1]
    advanced = [record for record in records if not record.skipped]
    seconds = sum(record.seconds for record in records) / len(records)
    line = f" iteration {last.step:8d}/{run.train_iters:8d} |"
    line += f" consumed samples: {last.consumed_samples:12d} |"
    line += f" elapsed time per iteration (ms): {seconds * 1000.0:.1f} |"
    line += f" learning rate: {last.learning_rate:.3E} |"
    line += f" global batch size: {last.global_batch_size:5d} |"
    for name in last.losses:
        average = sum(record.losses[name] for record in advanced) / max(len(advanced), 1)
        line += f" {name}: {average:.6E} |" if average != 0.0 else ""
    for name in last.metrics:
        known = [record.metrics[name] for record in records if not math.isnan(record.metrics[name])]
        line += f" {name}: {sum(known) / len(known) if known else math.nan:.6E} |"
    line += f" loss scale: {last.loss_scale:.1f} |"
    line += f" grad norm: {last.grad_norm:.3f} |" if last.grad_norm is not None else ""
    line += f" num zeros: {last.zeros:.1f} |" if last.zeros is not None else ""
    line += f" params norm: {last.params_norm:.3f} |" if last.params_norm is not None else ""
    line += f" number of skipped iterations: {sum(record.skipped for record in records):3d} |"
    line += f" number of nan iterations: {sum(record.nan for record in records):3d} |"
    return line


def speed_fields(run: RunInfo, records: list[StepRecord]) -> str:
    """megalith's fields, `key: value |` as Megatron's are.

    Tokens per second over all devices, TFLOP/s and MFU of one device in both conventions, time left.
    """
    speed = Speed(run, window=len(records))
    for record in records:
        speed.add(record)
    parts = [f" tokens per second: {speed.tokens_per_second:.1f}"]
    if run.flops_per_token_full:
        full, half = speed.tflops()
        parts += [f"TFLOP/s per device, full attention: {full:.4g}", f"TFLOP/s per device, causal half: {half:.4g}"]
    if utilization := speed.mfu():
        parts += [f"MFU, full attention: {utilization[0]:.2%}", f"MFU, causal half: {utilization[1]:.2%}"]
    return " | ".join([*parts, f"time left: {speed.time_left()} |"])


def validation_line(record: ValidationRecord) -> str:
    """Megatron's line on a validation; the perplexity of a loss above 20 is that of 20."""
    name = "val" if record.split == "validation" else record.split
    where = f"iteration {record.step}" + (f" for {name} data" if "/" in name else "")
    if record.at_end:
        where = f"the end of training for {name} data"
    line = f" {'validation loss' if record.losses else 'metrics'} at {where} | "
    for name, value in record.losses.items():
        line += f"{name} value: {value:.6E} | {name} PPL: {perplexity(value):.6E} | "
    for name, value in record.metrics.items():
        line += f"{name} value: {value:.6E} | "
    return line
