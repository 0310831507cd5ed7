"""--profile-pipeline: a picture of one step's timeline, above the schedule's ideal one."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from megalith.common.files import atomic_path
from megalith.runtime import timeline
from megalith.runtime.build import Runtime
from megalith.runtime.timeline import Span, Timeline
from megalith.training.callbacks import Callback, RunInfo, StepRecord
from megalith.training.reporting.plot import BLUE, GREEN, GREY, INK, ORANGE

PICTURE_FILE = "pipeline.png"
WARMUP_STEPS = 2  # steps that warm up caches before the one that is timed
COLORS = {"F": BLUE, "B": GREEN, "I": GREEN, "W": ORANGE}
NAMES = {"F": "forward", "B": "backward", "I": "backward, activations", "W": "backward, weights"}


class ProfilePipeline(Callback):
    """Times the third step of the process, or the last of a shorter run, and draws it into the run folder."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.step = runtime, 0

    def on_start(self, run: RunInfo) -> None:
        """Choose the step."""
        self.step = min(run.start_step + WARMUP_STEPS + 1, run.train_iters)
        if run.start_step + 1 == self.step:
            timeline.record(self.runtime)

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Start before the step, draw after it."""
        if record.step + 1 == self.step:
            timeline.record(self.runtime)
        elif record.step == self.step:
            found = timeline.collect(self.runtime)
            if run.writes:
                draw(found, run.folder / PICTURE_FILE)
                print(
                    f" pipeline of step {record.step}: {summary(found)}; picture {run.folder / PICTURE_FILE}",
                    flush=True,
                )


def summary(found: Timeline) -> str:
    """The bubbles, as text."""
    measured, ideal, equal = found.bubbles()
    best = f"at best {ideal:.1%} with stages of these speeds, {equal:.1%} with equal ones"
    return f"idle {measured:.1%} of computing time, {best}"


def draw(found: Timeline, picture: pathlib.Path) -> None:
    """Two timelines, one row per process; virtual stages of a process have different shades."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    measured, ideal, _ = found.bubbles()
    figure = Figure(figsize=(12, 1.8 + 0.9 * found.processes), dpi=160)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    best = f"{found.schedule} at best, each piece of work in its mean time: {ideal:.1%}"
    rows = (
        (panels[0], found.measured, f"measured: idle {measured:.1%} of computing time"),
        (panels[1], found.ideal, best),
    )
    for axes, spans, title in rows:
        bars(axes, spans, found.processes)
        axes.set_title(title, loc="left", color=INK, fontsize=11)
    panels[1].set_xlabel("milliseconds", color=INK)
    kinds = [kind for kind in NAMES if any(span.work.kind == kind for span in found.measured)]
    handles = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in kinds]
    panels[0].legend(
        handles=handles, frameon=False, ncols=len(handles), loc="lower right", bbox_to_anchor=(1.0, 1.0), labelcolor=INK
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png")


def bars(axes: Any, spans: Sequence[Span], processes: int) -> None:
    """The bars of one timeline; the number in a bar is the micro-batch."""
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    for span in spans:
        later = span.work.stage >= processes  # of several stages of a process all but the first are paler
        width = span.end - span.start
        axes.barh(span.process, 1e3 * width, left=1e3 * (span.start - begin), height=0.8, color=COLORS[span.work.kind],
                  alpha=0.6 if later else 1.0, edgecolor="white", linewidth=0.5)  # fmt: skip
        if width > 0.012 * (end - begin):
            middle = 1e3 * (span.start - begin + width / 2)
            axes.text(middle, span.process, str(span.work.micro_batch), color="white", fontsize=7,
                      ha="center", va="center")  # fmt: skip
    axes.set_yticks(range(processes), [f"process {process}" for process in range(processes)])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=GREY, labelcolor=INK, left=False)
