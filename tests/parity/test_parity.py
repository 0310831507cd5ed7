"""Every layout gives the loss and every gradient of one process, from the same initial weights."""

import functools
from unittest import mock

import pytest
import torch

from megalith.optim.clip import global_norm
from megalith.runtime.build import Runtime
from megalith.testing import run_ranks
from megalith.testing.parity import TOLERANCE, LayoutResult, compare, measure, merge
from tests.parity.cases import FORMS, LAYOUTS, PIPELINES, config_of

# The covering set: each layout with the form that tests it most, each form with several layouts. All others are slow.
COVERING = {
    ("absolute", "tp2"), ("absolute", "dp2 full"), ("absolute", "tp2 dp2 optimizer"), ("rotary", "tp4"), ("rotary",
     "tp2 sp"),
    ("rotary", "dp2 optimizer"), ("rotary", "tp2 dp2"), ("alibi", "tp4 sp"), ("alibi", "dp2 none"), ("odd vocabulary",
     "tp4"),
    ("odd vocabulary", "tp2 sp dp2 full"), ("odd layers", "tp2 sp"), ("odd layers", "dp 2x2"), ("dropout", "tp4 sp"),
    ("dropout", "tp2 dp2 optimizer"), ("dropout", "dp2 none"), ("post norm", "tp2 sp"),
    ("absolute", "cp2 pp2"), ("rotary", "cp4"), ("rotary", "cp2 tp2"), ("alibi", "cp2 tp2 sp"), ("odd vocabulary",
     "cp2 dp2"),
    ("odd layers", "cp2"), ("post norm", "cp4"), ("post norm", "cp2 dp2 optimizer"), ("dropout", "cp2 pp2"),
     ("dropout", "cp2 tp2 sp"),
    ("absolute", "pp2 gpipe"), ("absolute", "zbv"), ("absolute", "tp2 pp2 dp2"), ("rotary", "pp4"),
    ("rotary", "tp2 pp2"), ("rotary", "zbv dp2 full"), ("alibi", "pp2 zero-bubble"), ("alibi", "tp2 sp zbv"),
    ("odd vocabulary", "tp2 sp zbv"),
    ("odd layers", "pp2 interleaved"), ("odd layers", "dualpipev"), ("post norm", "dualpipev"), ("post norm",
     "pp2 zero-bubble"),
    ("window", "tp2 sp"), ("window", "cp4"), ("window", "cp2 pp2"), ("side by side", "tp4 sp"), ("side by side", "zbv"),
    ("side by side", "cp2 tp2 sp"), ("embedding norm", "tp2 sp zbv"), ("embedding norm", "pp2 interleaved"),
    ("embedding norm", "tp2 dp2 optimizer"),
    ("norm plus one", "tp2 sp zbv"), ("norm plus one", "cp2 dp2 optimizer"),
    ("dropout", "pp2"), ("dropout", "tp2 pp2 dp2"), ("dropout", "zbv selective"), ("dropout", "pp2 dp2"), ("absolute",
     "pp2 full uniform"),
    ("padding", "tp2 sp"), ("padding", "cp2 pp2"), ("padding alibi", "pp2"), ("padding alibi", "cp2"),
    ("bert", "tp2 sp"), ("bert", "dp2 none"), ("bert", "tp2 sp dp2 full"), ("bert", "pp2"), ("bert", "zbv"), ("bert",
     "cp2 tp2 sp"),
    ("bert dropout", "tp2 sp"), ("bert dropout", "pp2 interleaved"), ("bert dropout", "cp2"), ("bert google",
     "tp2 pp2"),
    ("bert google", "dp2 optimizer"), ("bert google", "tp2 sp zbv"), ("bert no order", "tp4 sp"), ("bert no order",
     "cp2 pp2"),
    ("bert classes", "tp2 sp"), ("bert classes", "pp2"), ("bert classes", "dp2 full"), ("bert classes", "cp2"),
    ("bert choices", "tp2 sp"), ("bert choices", "pp2"), ("bert choices", "dp2 full"), ("bert choices", "cp2 pp2"),
    ("t5", "tp2 sp"), ("t5", "dp2 none"), ("t5", "pp2"), ("t5", "tp2 sp zbv"), ("t5 relative", "tp4 sp"),
     ("t5 relative", "tp2 pp2"),
    ("t5 relative", "dp2 full"), ("t5 relative", "pp2 zero-bubble"), ("t5 relative", "pp2 full uniform"),
     ("t5 dropout", "tp2 sp"),
    ("t5", "cp2"), ("t5", "cp2 pp2 interleaved"), ("t5 relative", "cp4"), ("t5 relative", "cp2 tp2 sp"),
     ("t5 relative", "cp2 dp2"),
    ("t5 dropout", "cp2 pp2"), ("t5 dropout", "cp2 selective"), ("rotary", "cp2 full uniform"), ("dropout",
     "cp2 zbv selective"),
    ("ict", "tp2 sp"), ("ict", "dp2 none"), ("ict", "pp2"), ("ict", "tp2 dp2"), ("ict", "cp2 pp2"), ("ict", "dp2 full"),
    ("ict shared", "tp2 sp zbv"), ("ict shared", "dp2 full"), ("ict shared", "cp2"), ("ict hard", "pp2 dp2"),
    ("ict hard", "tp2 sp dp2 full"), ("lora ict", "tp2"),
    ("lora classes", "tp2 sp"), ("lora classes", "pp2"),
    ("retro", "tp2 sp"), ("retro", "pp2"), ("retro", "dp2 none"), ("retro", "tp2 pp2"), ("retro rotary", "dp2 full"),
    ("retro rotary", "tp4 sp"), ("retro rotary", "pp2 full uniform"), ("retro dropout", "tp2 sp zbv"),
    ("retro dropout", "zbv selective"), ("lora retro", "tp2 pp2"),
    ("lora", "tp2 sp dp2 full"), ("lora", "tp2 pp2"), ("lora dropout", "tp2 sp"), ("lora dropout", "cp2"),
    ("dora", "tp2 sp"), ("dora", "pp2"),
    ("lora t5", "tp2 sp zbv"), ("t5 dropout", "pp2 interleaved"), ("t5 dropout", "zbv selective"),
    ("t5 dropout", "zbv dp2 full"),
}  # fmt: skip
CASES = [
    pytest.param(form, layout, id=f"{form}-{layout}", marks=() if (form, layout) in COVERING else pytest.mark.slow)
    for form in FORMS
    for layout in LAYOUTS
    if "retro" not in form or "cp" not in layout  # which Retro refuses
]
# A compiled T5 takes 80 s by itself, and took over 300 s, in either format, on cores in use by others.
pytestmark = pytest.mark.timeout(900)


def norm(runtime: Runtime) -> float:
    """The norm that clipping goes by."""
    gradients, not_owned = runtime.gradients()
    return float(global_norm(gradients, not_owned=not_owned, stages=runtime.mesh.size("pp")))


@functools.cache
def on_one_process(form: str, dtype: torch.dtype, deep: bool) -> LayoutResult:
    """One process."""
    return run_ranks(measure, 1, config_of(form, deep=deep), dtype, norm)[0]


def measure_traced(*arguments) -> LayoutResult:
    """`measure`, a compiled layout with torch.compile's graphs, forward and backward, but not its C++.

    Compiling that takes most of the time of all these tests; it is compared in float32.
    """
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        return measure(*arguments)


def check(form: str, layout: str, dtype: torch.dtype) -> None:
    """Compare a layout with one process."""
    expected = on_one_process(form, dtype, layout in PIPELINES)
    run = measure_traced if dtype == torch.float64 else measure
    parts = run_ranks(run, LAYOUTS[layout][0], config_of(form, layout), dtype, norm, timeout=880)
    found = merge(parts)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), f"{name} starts from other values"
    for part in parts:  # what several ranks hold must be right on each of them
        own = LayoutResult(
            part.loss, part.weights, {name: expected.gradients[name] for name in expected.gradients} | part.gradients
        )
        loss, worst, *_ = compare(expected, own, dtype)
        assert loss.error <= TOLERANCE[dtype] and worst.error <= TOLERANCE[dtype], (loss, worst)
    loss, worst, *_ = compare(expected, found, dtype)
    assert worst.error <= TOLERANCE[dtype], worst
    assert [part.extra for part in parts] == pytest.approx([expected.norm] * len(parts), rel=TOLERANCE[dtype])


@pytest.mark.parametrize(("form", "layout"), CASES)
def test_gradients_in_float64(form: str, layout: str) -> None:
    check(form, layout, torch.float64)


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("absolute", "tp2 sp dp2 full"),
        ("rotary", "tp4"),
        ("dropout", "tp2 dp2"),
        ("dropout", "cp4"),
        ("t5 relative", "tp2 sp"),
        ("t5 relative", "cp2 tp2"),
    ],
)
def test_gradients_in_float32(form: str, layout: str) -> None:
    check(form, layout, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "layout"), CASES)
def test_every_case_in_float32(form: str, layout: str) -> None:
    check(form, layout, torch.float32)
