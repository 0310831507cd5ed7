"""Names of other programs are answered; what exists here is not called missing."""

import re

import pytest

import megalith
from megalith.cli.main import VERBS, main
from megalith.config.flags.flags import config_flags
from megalith.config.flags.foreign_names import _ANSWERS, megalith_name
from tests.toy import ROOT

SEEDS = ROOT.parent / "shared" / "seeds"
NOT_OURS = {  # of the sites' own set-up, or files that are read and not run
    "arguments.py",
    "install.sh",
    "utils.sh",
    "env_info.sh",
    "main.py",
    "distributed_with_mp.sh",
    "_distributed.sh",
    "bert_model.py",
    "gpt_model.py",
    "t5_model.py",
    "preprocess_data.sh",
}


@pytest.mark.parametrize("name", ["000_b31de77749924f24.txt", "001_9d32dca528cf1dc8.txt"])
def test_every_script_and_class_of_the_documents_is_answered(name):
    path = SEEDS / name
    if not path.exists():
        pytest.skip("needs the documents of ../shared")
    text = path.read_text()
    scripts = {
        match for match in re.findall(r"[\w./]*\w+\.(?:py|sh)\b", text) if match.rpartition("/")[2] not in NOT_OURS
    }
    classes = set(
        re.findall(
            r"\b(?:Megatron(?=LM)|Block(?=Data)|Faiss|ICT|GPT(?=Train)|Bert(?=Train)|T5(?=Train))[A-Za-z]+\b", text
        )
    )
    assert len(scripts) > 2 and len(classes) > 2
    assert not [each for each in scripts | classes if megalith_name(each) is None]


def test_each_name_has_one_answer():
    names = [name for _, names in _ANSWERS for name in names.split()]
    assert len(set(names)) == len(names) and [name for name in names if name != name.lower()] == []


def test_nothing_that_exists_is_called_missing():
    """An answer goes when what it speaks of is built."""
    missing = [name for text, names in _ANSWERS if "not there yet" in text for name in names.split()]
    assert not set(missing) & (set(VERBS) | set(megalith.__all__))
    assert [name for name in missing if name in config_flags()] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tools/run_text_generation_server.py"], "it is `megalith serve PATH` here"),
        (["tools/preprocess_data.py"], "it is `megalith data preprocess` here"),
        (["dedup"], "unknown verb dedup: it is `megalith data` here"),
        (["data", "preproces"], "unknown verb preproces: did you mean preprocess?"),
        (["checkpoint", "exprot"], "unknown verb exprot: did you mean export?"),
        (["generate", "--load", "x", "--max_length", "3"], "unknown flag --max_length: it is --max-new-tokens here"),
        (["pretrain", "gpt", "--strict-lambada"], "unknown flag --strict-lambada: it is `megalith evaluate` here"),
        (["race"], "unknown verb race: it is `megalith finetune TASK` here"),
    ],
)
def test_the_command_line_answers(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_python_answers():
    with pytest.raises(AttributeError, match="FaissMIPSIndex'; it is `megalith index` here"):
        megalith.FaissMIPSIndex  # noqa: B018
    with pytest.raises(AttributeError, match=r"it has GenerationParams, complete, .*, load, stream, train"):
        megalith.something_else  # noqa: B018
