"""Settings that every test shares: one thread per process, who shares a test process, and what this machine cannot run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests share the cores between processes

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for `--dist loadgroup`, and skip what needs an accelerator where there is none.

    All tests with ranks share one process, hence one pool and no more ranks at a time than one test asks for; the tests
    of any other file stay together, so that their module fixtures are made once.
    """
    for item in items:
        group = "ranks" if "ranks" in getattr(item, "fixturenames", ()) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.accelerator.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, this machine has none"))


@pytest.fixture(scope="session")
def ranks():
    """`ranks(function, world_size, *args, timeout=120)`: the function's result on every rank of a gloo group."""
    from megalith.testing import run_ranks

    return run_ranks
