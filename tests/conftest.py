"""Settings of all tests: one thread per process, one pool of ranks, and skips of what this machine cannot run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests share the cores between processes

import pytest

from tests import skips

# Files of a minute or more that come late by name: begun last, they would keep one process busy while the other has
# nothing left.
FIRST = ("tests/test_readme.py", "tests/test_examples.py", "tests/resume/", "tests/parity/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files go first (`make test` gives whole files to processes in this order), and slow tests get 15 minutes.

    On a machine that others use too they take several times as long as alone; a test that is stopped for its time takes
    its whole process with it.

    Tests marked `gpu` are skipped where there is no GPU; torch is imported only if there is such a test.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.accelerator.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, this machine has none"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """An unexpected skip of a test is a failure."""
    report = yield
    skips.judged(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """An unexpected skip of a whole file is one too."""
    report = yield
    skips.judged(report)
    return report


@pytest.fixture(scope="session")
def ranks():
    """`ranks(function, world_size, *args, timeout=120)`: the function's result on every rank of a gloo group."""
    from megalith.testing import run_ranks

    return run_ranks
