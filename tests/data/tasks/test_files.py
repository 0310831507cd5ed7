"""Rows of tables and JSON lines: columns by name or number, files without labels, rows that cannot be used."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError, DataError
from megalith.data.tasks.description import names, parse_description, read_description
from megalith.data.tasks.examples import read_examples
from megalith.data.tasks.files import files_of, read_rows

PAIRS = "labels: [no, yes]\ncolumns: {uid: id, text_a: one, text_b: two, label: answer}"  # YAML's no and yes


def task(text=PAIRS, source="mine.yaml"):
    return parse_description(text.replace("[no, yes]", "['no', 'yes']"), source, "mine")


def test_every_task_that_ships_is_one():
    assert names() == ["cola", "mnli", "mrpc", "qnli", "qqp", "race", "rte", "sst2", "stsb"]
    classes = {name: read_description(name).classes for name in names()}
    assert classes == dict.fromkeys(names(), 2) | {"mnli": 3, "race": 4, "stsb": 1}
    assert read_description("MNLI").labels == ("contradiction", "entailment", "neutral")


def test_glue_files_without_labels_are_known_by_their_first_line(tmp_path):
    headers = {
        "mnli": "index\tpromptID\tpairID\tgenre\tp\tp\tp\tp\tsentence1\tsentence2",
        "qqp": "id\tquestion1\tquestion2",
        "cola": "index\tsentence",
        "sst2": "index\tsentence",
        "mrpc": "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
    }
    for name, header in headers.items():
        row = "\t".join(["7", *[f"text {at}" for at in range(header.count("\t"))]])
        (tmp_path / "test.tsv").write_text(f"{header}\n{row}\n")
        rows = read_rows(tmp_path / "test.tsv", read_description(name))
        assert not rows.labelled and rows.rows[0].values["uid"] == "7", name
        assert rows.rows[0].values["text_a"].startswith("text") and len(rows.rows) == 1
    (tmp_path / "train.tsv").write_text("gj04\t1\t\tThey drank the pub.\n")  # CoLA's has no header
    (row,) = read_rows(tmp_path / "train.tsv", read_description("cola")).rows
    assert row.values == {"text_a": "They drank the pub.", "label": "1"}


def test_a_label_by_number_beside_texts_by_name(tmp_path):
    """Names that a file with labels has too do not make it one without."""
    by_number = "labels: [no, yes]\ncolumns: {text_a: sentence, label: 1}"
    (tmp_path / "train.tsv").write_text("sentence\tanswer\na b\tyes\n")
    (tmp_path / "test.tsv").write_text("sentence\na b\n")
    for text in (by_number, by_number + "\nunlabelled: {text_a: sentence}"):
        rows = read_rows(tmp_path / "train.tsv", task(text))
        assert rows.labelled and rows.rows[0].values == {"text_a": "a b", "label": "yes"}
        rows = read_rows(tmp_path / "test.tsv", task(text))
        assert not rows.labelled and rows.rows[0].values == {"text_a": "a b"}


cells = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\x85"), max_size=8)


@settings(deadline=None)
@given(st.lists(st.tuples(cells, cells, cells, cells), min_size=1, max_size=5))
def test_a_table_is_read_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in [("id", "one", "two", "answer"), *rows]))
    found = read_rows(path, task())
    assert not found.bad
    assert [tuple(row.values[name] for name in ("uid", "text_a", "text_b", "label")) for row in found.rows] == rows


def test_rows_that_cannot_be_used_are_listed_and_the_others_kept(tmp_path):
    good = "1\ta b\tc d\tyes\n"
    (tmp_path / "a.tsv").write_bytes(
        b"id\tone\ttwo\tanswer\n" + good.encode() + b"2\ta\tb\n" + b"3\ta\tb\tmaybe\n" + b"4\t \tb\tno\n"
        + b"5\t\xff\tb\tno\n" + good.encode()
    )  # fmt: skip
    found = read_examples([tmp_path / "a.tsv"], task(), training=True)
    assert [example.label for example in found.examples] == [1, 1] and found.examples[0].pairs == (("a b", "c d"),)
    assert sorted((row.line, row.why) for row in found.bad) == [
        (3, "it has 3 columns, and the first line 4"),
        (4, "its label 'maybe' is none of no, yes"),
        (5, "its text_a is empty"),
        (6, "it is not UTF-8: invalid start byte"),
    ]


def test_json_lines_and_csv_give_what_a_table_gives(tmp_path):
    record = {"id": 1, "one": "a, b", "two": 'c "d"', "answer": "yes", "more": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n\n" + json.dumps({"id": 2}) + "\n{\n[1]\n")
    (tmp_path / "a.csv").write_text('id,one,two,answer\n1,"a, b","c ""d""",yes\n')
    lines, table = (read_examples([tmp_path / name], task(), training=True) for name in ("a.jsonl", "a.csv"))
    assert lines.examples == table.examples and not table.bad
    assert [row.line for row in lines.bad] == [4, 5, 3]
    assert [row.why.split(":")[0] for row in lines.bad][-1].startswith("it has no one and no two and no answer")


def test_wrong_files_are_named_with_the_rule_and_the_cure(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("id\tone\tzwei\tanswer\n1\ta\tb\tyes\n")
    with pytest.raises(DataError, match=r"a.tsv must have the column 'two' of the task mine .*found 4 columns.*'zwei'"):
        read_rows(path, task())
    for text in ("", "id\tone\ttwo\tanswer\n"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"a\.tsv must have rows of the task; found an empty file"):
            read_examples([path], task(), training=True)
    path.write_text("id\tone\ttwo\n1\ta\tb\n")
    with pytest.raises(DataError, match=r"--train-data \S+a.tsv must have labels to train on, in the column 'answer'"):
        read_examples([path], task(), training=True)
    path.write_text("id\tone\ttwo\tanswer\n1\ta\tb\tja\n")
    with pytest.raises(DataError, match=r"found 1 that cannot be used \(line 2: its label 'ja' is none of no, yes\)"):
        read_examples([path], task(), training=False)
    with pytest.raises(DataError, match="--train-data must be a file, or a folder of"):
        files_of([str(tmp_path / "absent.tsv")], task(), "--train-data")


WRONG = {
    "labels: [a]\ncolumns: {text_a: 0, label: 1}": "labels must be at least two different labels",
    "labels: [a, b]\ncolumns: {text_a: 0}": "columns must say where the label is",
    "labels: [a, b]\ncolumns: {text_a: 0, label: 1, colour: 2}": "columns must name text_a, label, text_b, uid",
    "kind: ranking": "kind must be one of classification, regression, multiple_choice",
    "label: [a, b]": "A key of mine.yaml must be one of kind, columns",
    "labels: a\ncolumns: {text_a: 0, label: 1}": "labels must be a list",
    "labels: [a, b, c]\ncolumns: {text_a: 0, label: 1}\nmetrics: [f1]": "must not have f1",
    "labels: [a, b]\ncolumns: {text_a: 0, label: 1}\nmetrics: [pearson]": "must be of accuracy, f1, matthews",
    "kind: regression\ncolumns: {text_a: 0, label: 1}": "must be of pearson",
    "- a": "must map names to values",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_description_that_cannot_work(text):
    with pytest.raises(ConfigError) as error:
        task(text)
    assert WRONG[text] in str(error.value)
