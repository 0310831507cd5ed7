"""A skip that nobody expects fails the run; those with a listed and true reason do not."""

import pathlib
import re

import pytest

from tests import skips

pytest_plugins = ["pytester"]
CONFTEST = pathlib.Path(__file__).with_name("conftest.py").read_text()
FILE = """
import pytest
{whole}
def test_marked():
    pytest.skip({reason!r})

@pytest.fixture
def gone():
    pytest.skip({reason!r})

def test_of_a_fixture(gone): ...

@pytest.mark.skipif(True, reason={reason!r})
def test_of_a_mark(): ...

@pytest.mark.xfail
def test_expected_failure():
    raise RuntimeError

def test_that_runs(): ...
"""


@pytest.mark.parametrize(
    ("reason", "whole", "outcomes"),
    [
        ("could not import 'x'", "", {"failed": 1, "errors": 2, "passed": 1, "xfailed": 1}),
        ("transformers refuses null here", "", {"skipped": 3, "passed": 1, "xfailed": 1}),
        ("anything", 'pytest.importorskip("no_such_module")', {"errors": 1}),
        # It is so listed, but not true
        (
            "reads /proc, which only Linux has",
            "",
            {"failed": 1, "errors": 2, "passed": 1, "xfailed": 1},
        ),
    ],
)
def test_unexpected_skips_fail(pytester, monkeypatch, reason, whole, outcomes):
    monkeypatch.setattr("sys.platform", "linux")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(FILE.format(reason=reason, whole=whole))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(**outcomes)
    assert (result.ret == pytest.ExitCode.OK) == ("skipped" in outcomes)
    if "skipped" not in outcomes:
        result.stdout.fnmatch_lines(["*an unexpected skip*"])


def test_every_expected_reason_is_used():
    """A reason that no test gives any more goes from the list."""
    folder, own = pathlib.Path(__file__).parent, ("skips.py", "test_skips.py")
    sources = "\n".join(path.read_text() for path in folder.rglob("*.py") if path.name not in own)
    for words in skips.EXPECTED:
        assert re.search(words, sources), words
