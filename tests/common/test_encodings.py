"""Messages on text that is not UTF-8."""

import pytest

from megalith.cli.main import main
from megalith.common.encodings import conversion_advice, reason


@pytest.mark.parametrize(
    ("content", "command"), [("café".encode("latin1"), "iconv -f LATIN1"), ("a".encode("utf-16"), "iconv -f UTF-16")]
)
def test_the_cure_names_the_conversion(content, command):
    with pytest.raises(UnicodeDecodeError) as caught:
        content.decode("utf-8")
    assert command in conversion_advice(["a.jsonl:3: malformed JSON", f"a.txt: {reason(caught.value)}"])


def test_there_is_no_cure_for_other_faults():
    assert conversion_advice(["a.jsonl:3: malformed JSON"]) == conversion_advice([]) == ""


def test_every_command_that_reads_text_says_it_and_lists_a_file_once(tmp_path, capsys):
    text, yaml = tmp_path / "latin.txt", tmp_path / "latin.yaml"
    text.write_bytes("café\n".encode("latin1"))
    yaml.write_bytes("# café\n".encode("latin1"))
    output = [
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "9",
        "--workers",
        "1",
        "--output-prefix",
        str(tmp_path / "out"),
    ]
    commands = [
        (1, ["data", "bpe", "--input", str(text), "--vocab-size", "300", "--output", str(tmp_path / "t.json")]),
        (1, ["data", "preprocess", "--input", str(text), *output]),
        (1, ["generate", "--load", str(tmp_path), "--prompt-file", str(text)]),
        (2, ["pretrain", "gpt", "--config", str(yaml)]),
    ]
    for status, command in commands:
        assert main(command) == status
        said = capsys.readouterr().err
        assert "`iconv -f LATIN1 -t UTF-8 FILE > NEW`" in said and said.count("latin.txt: not UTF-8") <= 1, said
