"""loss.png: the run as a picture, drawn from metrics.jsonl when it ends."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from megalith.common import units
from megalith.common.files import atomic_path
from megalith.training.callbacks import Callback, RunInfo
from megalith.training.reporting.metrics import METRICS_FILE, read_metrics

INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#8a8a8a", "#1f6fb4", "#d95f02", "#1b9e77"
_POINTS = 5000  # more than a picture has pixels; a longer run is thinned


class LossPlot(Callback):
    """Draws the picture when the run ends."""

    def on_end(self, run: RunInfo) -> None:
        """Draw, if the run has made a step."""
        if run.writes and (run.folder / METRICS_FILE).exists():
            draw_loss(run.folder / METRICS_FILE, run.folder / "loss.png", run.config.logging.name)


def smooth(values: Sequence[float], fraction: float = 1 / 40) -> list[float]:
    """Exponential mean of the values so far, whose half-life is `fraction` of their number (at least 1).

    It grows with the run because loss falls fastest at its start, where a long mean would lag far above the curve.
    """
    mean, weight, smoothed = 0.0, 0.0, []
    for number, value in enumerate(values, 1):
        weight = 0.5 ** (1.0 / max(number * fraction, 1.0)) * weight + 1.0
        mean += (value - mean) / weight
        smoothed.append(mean)
    return smoothed


def draw_loss(metrics: pathlib.Path, picture: pathlib.Path, title: str) -> bool:
    """Draw training loss (each step, and smoothed) and validation loss over steps; False if there is nothing to draw.

    Below it the metrics of validation data, where a task has some.

    matplotlib is imported here because it takes half a second, and without pyplot because that keeps global state.
    """
    training, validation, test, tokens, seconds = [], [], [], 0, 0.0
    named: dict[str, list[tuple[int, float]]] = {}  # losses of validation data that are measured by name
    metrics_of: dict[str, list[tuple[int, float]]] = {}  # of validation data, by name and metric
    for line in read_metrics(metrics):
        if line.get("loss") is not None:
            training.append((line["step"], line["loss"]))
            tokens, seconds = tokens + line["tokens"], seconds + line["seconds"]
        elif line.get("validation_loss") is not None:
            validation.append((line["step"], line["validation_loss"]))
        elif line.get("test_loss") is not None:
            test.append((line["step"], line["test_loss"]))
        for key, value in line.items():
            if key.startswith("validation/") and key.endswith("_loss") and value is not None:
                named.setdefault(key.removesuffix("_loss"), []).append((line["step"], value))
            elif key.startswith("validation") and key.endswith("_metrics"):
                for name, each in value.items():
                    points = metrics_of.setdefault(f"{key.removesuffix('_metrics')}, {name}", [])
                    points += [] if each is None else [(line["step"], each)]
    if not training:
        return False

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric_curves = {name: points for name, points in metrics_of.items() if points}
    figure = Figure(figsize=(8, 7.4 if metric_curves else 4.6), dpi=160)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(2, 1, 1) if metric_curves else figure.add_subplot()
    steps, losses = [step for step, _ in training], [loss for _, loss in training]
    smoothed = smooth(losses)
    thin = math.ceil(len(steps) / _POINTS)
    axes.plot(steps[::thin], losses[::thin], color=BLUE, alpha=0.28, linewidth=0.8)
    axes.plot(
        steps[::thin], smoothed[::thin], color=BLUE, linewidth=1.8, label=f"training, smoothed: {smoothed[-1]:.3f}"
    )
    if validation:
        axes.plot(
            *zip(*validation),
            color=ORANGE,
            linewidth=1.4,
            marker="o",
            markersize=4,
            label=f"validation: {validation[-1][1]:.3f}",
        )
    for style, (name, points) in zip(("--", ":", "-.") * len(named), named.items()):
        axes.plot(
            *zip(*points), color=ORANGE, alpha=0.7, linewidth=1.0, linestyle=style, label=f"{name}: {points[-1][1]:.3f}"
        )
    if test:
        axes.plot(*test[-1], color=GREEN, marker="D", markersize=5, linestyle="none", label=f"test: {test[-1][1]:.3f}")
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    summary = f"{steps[-1]:,} steps, {units.count(tokens)} tokens, {units.duration(seconds)}"
    axes.set_title(summary, loc="right", color=GREY, fontsize=9)
    axes.set_ylabel("loss (nats)", color=INK)
    every = [axes]
    if metric_curves:
        every.append(figure.add_subplot(2, 1, 2, sharex=axes))
        for name, points in metric_curves.items():
            every[1].plot(*zip(*points), linewidth=1.4, marker="o", markersize=3, label=f"{name}: {points[-1][1]:.3f}")
    every[-1].set_xlabel("step", color=INK)
    for each in every:
        _style(each, "upper right" if each is axes else "best")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _style(axes: Any, legend: str) -> None:
    """Light lines, and a legend without a frame, at this place."""
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=GREY, labelcolor=INK)
    axes.legend(frameon=False, loc=legend, labelcolor=INK)
