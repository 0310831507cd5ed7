"""Lines of JSON: what either parser reads is read, and what neither reads is reported."""

import json
import math
import sys

import pytest

from megalith.common.errors import DataError
from megalith.common.json_lines import parse
from megalith.generation.params import GenerationParams
from megalith.training.reporting.metrics import read_metrics
from megalith.workflows.prompt_files import read_prompts


def nested(levels):
    return '{"text": "a", "x": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "x": NaN}',
        '{"text": "a", "x": [Infinity, {"y": -Infinity}]}',
        '{"text": "a", "x": 1e999}',
        nested(1500),
        nested(5000),
        '{"text": "a", "x": "\\ud800"}',
        '{"\\udc00": 1, "text": "a"}',
        '{"text": "a", "x": -1e999}',
    ],
)
def test_what_orjson_refuses_is_read_by_python(line):
    before = sys.getrecursionlimit()
    assert parse(line)["text"] == parse(line.encode())["text"] == "a"
    assert sys.getrecursionlimit() == before


def test_values_are_those_of_python():
    for line in ("NaN", "[Infinity, -Infinity]", '{"a": 1.5, "b": [1, null, true, "\\u00e9"]}', '"text"', "3"):
        assert repr(parse(line)) == repr(json.loads(line))
    assert math.isnan(parse(b"[NaN]")[0])


@pytest.mark.parametrize("line", ["", "{", "[1,]", '{"a": nan}', "{'a': 1}", b'"\xff"', '{"a": "\t"}', nested(20_000)])
def test_what_neither_reads_is_a_value_error(line):
    with pytest.raises(ValueError):
        parse(line)


@pytest.mark.parametrize("name", ["prompts.jsonl", "PROMPTS.JSONL"])
def test_prompt_files(tmp_path, name):
    path = tmp_path / name
    path.write_text(
        '{"prompt": "a", "score": NaN}\n"b\u2028c"\n' + nested(3000).replace("text", "prompt"), encoding="utf-8"
    )
    assert read_prompts(None, str(path), GenerationParams())[0] == ["a", "b\u2028c", "a"]
    path.write_text('"a"\n"\\udc00"\n')
    with pytest.raises(DataError, match=r"line 2.*unpaired surrogate"):
        read_prompts(None, str(path), GenerationParams())


def test_metrics_that_other_tools_have_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
