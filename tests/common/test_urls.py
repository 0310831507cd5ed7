"""Addresses and paths."""

import pathlib

from megalith.common.urls import is_url


def test_is_url() -> None:
    assert is_url("https://example.com/a.zip") and is_url("http://x")
    assert not is_url("a/b") and not is_url(pathlib.Path("https:/x")) and not is_url("ftp://x")
