"""Documents that are left out: each is reported with its reason, their number is bounded, empty ones may be kept."""

import json
import pathlib

import pytest

from megalith.cli.main import main
from megalith.common.errors import ConfigError, DataError
from megalith.data.corpus.preprocess import PreprocessOptions, preprocess
from megalith.data.corpus.unusable import check_limit, parse_limit, require_usable
from megalith.data.indexed import IndexedDataset
from megalith.data.samples.gpt_dataset import GPTDataset
from megalith.data.tokenizers.other import NullTokenizer
from megalith.data.tokenizers.tokenizer import TokenizerOptions

NULL = TokenizerOptions(tokenizer_type="NullTokenizer", vocab_size=100)


class WithBos(NullTokenizer):
    """Puts BOS before every text, as Llama 2's does."""

    bos = 77

    def encode(self, text):
        return [self.bos, *super().encode(text)]


def run(tmp_path, records, name="out", **changes):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    settings = {"tokenizer": NULL, "workers": 1} | changes
    return preprocess(
        PreprocessOptions(input=[str(tmp_path / "a.jsonl")], output_prefix=str(tmp_path / name), **settings)
    )


def rows(result, key="text"):
    return [row.tolist() for row in IndexedDataset(result.prefixes[key])[:]]


NESTED = "[" * 3000 + "]" * 3000


def test_lines_that_only_python_reads_are_documents(tmp_path):
    extra = ("NaN", "Infinity", "[-Infinity]", '{"y": NaN}', "1e999", '"\\udc00"', NESTED)
    lines = [f'{{"text": "{number}", "x": {value}}}' for number, value in enumerate(extra)]
    result = run(tmp_path, [*lines, '{"text": NaN}', '{"text": "\\ud800"}', '{"text": nan}'], max_unusable=3)
    assert rows(result) == [[number] for number in range(len(extra))]
    reasons = [line.partition("jsonl:")[2] for line in result.problems]
    assert [line.partition(" (")[0] for line in reasons] == [
        "8: key 'text' is no text but float",
        "9: malformed JSON",
        "10: malformed JSON",
    ]
    assert "half of a character" in reasons[1]


RECORDS = [{"a": "1", "b": "2"}, {"a": "", "b": "3"}, {"a": "4", "b": " "}, {"a": "", "b": ""}, {"a": "5", "b": "6"}]


@pytest.mark.parametrize("kind", ["NullTokenizer", "tests.data.corpus.test_unusable:WithBos"])
@pytest.mark.parametrize("split_sentences", [False, True])
def test_empty_texts_are_treated_alike_by_every_tokenizer(tmp_path, kind, split_sentences):
    settings = {"json_keys": ("a", "b"), "tokenizer": TokenizerOptions(tokenizer_type=kind, vocab_size=100)}
    settings["split_sentences"] = split_sentences
    bos = [77] if "Bos" in kind else []
    result = run(tmp_path, RECORDS, **settings)
    assert rows(result, "a") == [[*bos, 1], [*bos, 5]] and rows(result, "b") == [[*bos, 2], [*bos, 6]]
    assert (result.documents, result.num_problems, result.num_empty) == (2, 3, 3)
    where = ("no text in 'a'", "no text in 'b'", "no text in 'a' and 'b'")
    assert [line.partition("jsonl:")[2] for line in result.problems] == [
        f"{i}: empty document ({key})" for i, key in zip((2, 3, 4), where)
    ]
    kept = run(tmp_path, RECORDS, "kept", on_empty="keep", append_eod=True, **settings)
    assert rows(kept, "a") == [[*bos, *row, 100] for row in ([1], [], [4], [], [5])]
    assert rows(kept, "b") == [[*bos, *row, 100] for row in ([2], [3], [], [], [6])]
    assert (kept.documents, kept.num_problems, kept.num_empty) == (5, 0, 0)


def test_kept_documents_may_have_no_token(tmp_path):
    result = run(tmp_path, [{"text": "1 2 3 4 5"}, {"text": ""}, {"text": "6 7 8 9"}, {"text": ""}], on_empty="keep")
    data = IndexedDataset(result.prefixes["text"])
    assert rows(result) == [[1, 2, 3, 4, 5], [], [6, 7, 8, 9], []] and data.num_documents == 4
    data.verify()
    made = GPTDataset(data, (0, 4), 2, seq_length=4, seed=1)
    assert all(set(made[i]["input_ids"].tolist()) < set(range(1, 10)) and len(made[i]["labels"]) == 4 for i in (0, 1))


def test_on_error_fail_stops_at_an_empty_text_and_names_the_key(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:2: empty document \(no text in 'a'\).*--on-empty keep"):
        run(tmp_path, RECORDS, json_keys=("a", "b"), on_error="fail")
    assert run(tmp_path, RECORDS, json_keys=("a", "b"), on_error="fail", on_empty="keep").documents == 5


def test_the_key_of_a_refused_text_is_reported(tmp_path):
    result = run(tmp_path, [{"a": "1", "b": "x"}, {"a": "1", "b": "2"}], json_keys=("a", "b"), max_unusable=1)
    assert "a.jsonl:1: key 'b': Text for NullTokenizer" in result.problems[0]


@pytest.mark.parametrize(
    ("limit", "good"), [(0.1, False), (0.3, True), (2, False), (3, True), (0, False), (0.0, False), (1.0, True)]
)
def test_too_many_unusable_documents_are_an_error(tmp_path, limit, good):
    records = [{"text": str(i)} for i in range(7)] + ["{", {"body": "1"}, {"text": 3}] + [{"text": ""}] * 5
    if good:
        result = run(tmp_path, records, max_unusable=limit)
        # Empty ones are not meant by the limit
        assert (result.documents, result.num_problems, result.num_empty) == (
            7,
            8,
            5,
        )
        # Nor is what was made under another limit accepted
        with pytest.raises(DataError, match="3 unusable documents of 15"):
            run_again(tmp_path, 0.05)
    else:
        with pytest.raises(
            DataError, match=r":8: malformed(.|\n)*3 unusable documents of 15 \(20.00%\).*--max-unusable 3\.$"
        ):
            run(tmp_path, records, max_unusable=limit)
        assert not list(tmp_path.glob("out_*"))
        assert run_again(tmp_path, 3).resumed_parts == 1  # nothing is read twice


def run_again(tmp_path, limit):
    given = {
        "input": [str(tmp_path / "a.jsonl")],
        "output_prefix": str(tmp_path / "out"),
        "tokenizer": NULL,
        "workers": 1,
    }
    return preprocess(PreprocessOptions(**given, max_unusable=limit))


@pytest.mark.parametrize(
    ("text", "value"), [("25", 25), ("0.02", 0.02), ("2%", 0.02), ("1.0", 1.0), ("1", 1), ("100%", 1.0), ("0", 0)]
)
def test_limits(text, value):
    assert parse_limit(text) == value and type(parse_limit(text)) is type(value)


@pytest.mark.parametrize("text", ["-1", "1.5", "200%", "nan", "some", "", "%", "inf"])
def test_no_limits(text):
    with pytest.raises(ConfigError, match=r"--max-unusable must be a count .* or a fraction .*; found"):
        parse_limit(text)


def test_limit_of_nothing():
    require_usable(0, 0, 0, [])
    with pytest.raises(ConfigError):
        check_limit(True)


def command(tmp_path, *more):
    given = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    return main(["data", "preprocess", *given, "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", *more])


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n' * 8 + '{"body": "1"}\n' * 2 + '{"text": ""}\n')
    assert command(tmp_path) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "at most 0.1 of its documents unusable (--max-unusable); found 2 unusable documents of 11 (18.18%)." in last
    assert command(tmp_path, "--max-unusable", "20%") == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "skipped 2 unusable documents (18.18%; --max-unusable 0.2) and 1 without text (--on-empty keep keeps them)"
    )
    assert pathlib.Path(f"{tmp_path}/out_text_document.idx").exists()
    # Not 1, which is a count
    assert command(tmp_path, "--max-unusable", "1.0") == 0 and "--max-unusable 1.0)" in capsys.readouterr().err
    assert command(tmp_path, "--max-unusable", "much") == 2
    assert command(tmp_path, "--on-empty", "drop") == 2


def test_bpe_counts_too(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3 + '{"text": "aa aa", "y": NaN}\n')
    given = [
        "data",
        "bpe",
        "--input",
        str(tmp_path / "a.jsonl"),
        "--vocab-size",
        "300",
        "--output",
        str(tmp_path / "t.json"),
    ]
    assert main(given) == 1 and not (tmp_path / "t.json").exists()
    assert "3 unusable documents of 4 (75.00%)" in capsys.readouterr().err
    assert main([*given, "--max-unusable", "3"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "skipped 3 unusable documents of 4"
