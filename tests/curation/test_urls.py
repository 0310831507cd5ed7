"""Lists of URLs: what each rule leaves out, the order that stays, the first of equal ones."""

import pathlib

import pytest

from megalith.curation.urls import FilterUrls, Urls

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"


@pytest.fixture(scope="module")
def rules():
    step = FilterUrls(Urls())
    step.load()
    return step


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("http://a", "short"),
        ("http://ab", "malformed"),
        ("http://ab.de", ""),
        ("ftp://example.org/a", "malformed"),
        ("example.org/a/page", "malformed"),
        ("http://exa mple.org/", "malformed"),
        ("http://example.org:port/", "malformed"),
        ("http://example.org:80/a?b=c#d", ""),
        ("http://192.168.0.1/page", ""),
        ("http://[::1/page", "malformed"),
        ("http://-bad-.org/page", "malformed"),
        ("https://www.youtube.com/watch?v=1", "domain"),
        ("https://notyoutube.com/watch", ""),
        ("http://www.google.co.uk/search", "domain"),
        ("http://google.example.org/", ""),
        ("https://sub.deep.imgur.com/x", "domain"),
        ("http://example.org/a.JPG?x=1", "extension"),
        ("http://example.org/a.7z", "extension"),
        ("http://example.org/a.ai", "extension"),
        ("http://example.org/jpg", ""),
        ("http://müller.example.org/straße", ""),
    ],
)
def test_rules(rules, url, rule):
    assert rules.reason(url)[0] == rule


def test_a_list(tmp_path, step):
    lines = [
        "http://b.org/1",
        "http://a.org/x.pdf",
        "https://www.b.org/1/",
        "",
        "http://a.org/2",
        "http://b.org/1#top",
        "http://a.org/3",
    ]
    (tmp_path / "urls.txt").write_text("\n".join(lines))
    from megalith.curation.pipeline import build_command
    from megalith.curation.run import RunOptions, execute

    output = tmp_path / "good.txt"
    options = RunOptions(input=[str(tmp_path / "urls.txt")], output=str(output), json_key="url", engine="inline")
    report = execute(build_command("urls", {}), options)
    assert output.read_text().splitlines() == ["http://b.org/1", "http://a.org/2", "http://a.org/3"]
    assert {rule: found["documents"] for rule, found in report["rules"].items()} == {"extension": 1, "repeated": 2}
    assert report["rules"]["extension"]["examples"][0]["where"].endswith("urls.txt:2")


def test_lists_are_replaceable_and_records_too(write, step, tmp_path):
    (tmp_path / "domains").write_text("# mine\nexample.org\n")
    (tmp_path / "ends").write_text(".xyz\n")
    rows = [
        {"url": "http://youtube.com/a.pdf", "n": 1},
        {"url": "http://x.example.org/"},
        {"url": "http://a.com/b.xyz"},
    ]
    settings = {"domains": str(tmp_path / "domains"), "extensions": str(tmp_path / "ends")}
    records, _ = step("urls", write("a.jsonl", rows), settings, json_key="url")
    assert records == rows[:1]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data in ../shared")
def test_real_urls_stay(rules):
    lines = (SHARED / "dedup/url_list_145.txt").read_text().split()
    assert [line for line in lines if rules.reason(line)[0]] == []
