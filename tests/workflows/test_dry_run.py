"""What --dry-run looks at beside the config."""

import numpy as np
import pytest

from megalith.config.flags import flags
from megalith.config.run import RunConfig
from megalith.data.indexed import IndexedWriter
from megalith.workflows.dry_run import faults, number_of_processes, unnamed

TYPED = {"tokenizer_type": "NullTokenizer"}


def missing(config: RunConfig) -> list[str]:
    """All lines of a dry run."""
    return [*faults(config), *unnamed(config.data)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a dataset, one without documents, two that were cut off, half of one, and a vocabulary."""
    monkeypatch.chdir(tmp_path)
    for name, documents in (("there", 2), ("bare", 0), ("cut", 2), ("torn", 2)):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(documents):
                writer.add_sequence([1, 2, 3])
                writer.end_document()
    (tmp_path / "cut.bin").write_bytes(b"12")
    (tmp_path / "torn.idx").write_bytes((tmp_path / "torn.idx").read_bytes()[:-7])
    for name in ("half.bin", "vocab.txt"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data_path": ["there"], **TYPED}, []),
        ({"data_path": ["there.bin"], "tokenizer_type": "BertWordPieceCase", "vocab_file": "vocab.txt"}, []),
        ({"dataset": "mine:Data", "tokenizer_type": "mine:Tokenizer"}, []),
        ({"data_path": ["0.3", "there", "0.7", "nowhere"], **TYPED}, ["--data-path: no indexed dataset at nowhere"]),
        ({"data_path": ["half"], **TYPED}, ["--data-path: half.bin has no partner half.idx"]),
        ({"data_path": ["bare"], **TYPED}, ["--data-path: bare has no documents"]),
        ({"data_path": ["cut"], **TYPED}, ["--data-path: cut.idx"]),
        ({"data_path": ["torn"], **TYPED}, ["--data-path: torn.idx"]),
        ({"data_path": ["."], **TYPED}, ["--data-path: bare has", "--data-path: cut.idx", "--data-path: torn.idx"]),
        ({"data_path": ["1", "there", "two", "there"], **TYPED}, ["--data-path must have a weight before each prefix"]),
        (
            {"train_data_path": ["there"], "valid_data_path": ["v"], **TYPED},
            ["--valid-data-path: no indexed dataset at v"],
        ),
        ({"data_file_list": "list", **TYPED}, ["--data-file-list list cannot be read"]),
        (
            {"data_path": ["there"], "data_weights_schedule": "w", **TYPED},
            ["--data-weights-schedule: there is no file w"],
        ),
        (
            {"dataset": "ict", "data_path": ["there"], "titles_data_path": "t", **TYPED},
            ["--titles-data-path: no indexed dataset at t"],
        ),
        ({**TYPED}, ["--data-path is not given"]),
        ({"data_path": ["there"]}, ["--tokenizer-type is not given"]),
        (
            {"data_path": ["there"], "tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v.json"},
            ["--vocab-file: there is no v.json here", "--merge-file is not given: GPT2BPETokenizer is made from it"],
        ),
        (
            {"data_path": ["there"], "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "gpt2"},
            ["--tokenizer-model: there is no gpt2 here, and the Hugging Face Hub would be asked for it"],
        ),
        (
            {"data_path": ["there"], "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "t.json"},
            ["--tokenizer-model: there is no t.json here"],
        ),
        ({"data_path": ["there"], **TYPED, "load": "other"}, ["--load: other: no checkpoint found"]),
        ({"data_path": ["there"], **TYPED, "load": "run", "save": "run"}, []),
        ({"data_path": ["there"], **TYPED, "load": "runs/gpt/checkpoints"}, []),
    ],
)
def test_what_is_missing(values, words, here):
    lines = missing(RunConfig().replace(**values))
    assert len(lines) == len(words) and all(line.startswith(word) for line, word in zip(lines, words, strict=True)), (
        lines
    )


def test_the_files_of_a_list(here):
    (here / "list").write_text("0.5 there a\n0.5 gone b\n")
    (line,) = missing(RunConfig().replace(data_file_list="list", **TYPED))
    assert line.startswith(f"--data-file-list: no indexed dataset at {here / 'gone'}")


@pytest.mark.parametrize(
    ("argv", "texts", "layout", "number", "line"),
    [
        ([], ["processes: 8"], 1, 1, ""),  # a run that is not dry
        (["--dry-run"], [], 1, 1, ""),
        (["--dry-run"], [], 4, 4, "checked for 4 processes, the fewest of this layout"),
        (["--dry-run"], ["processes: 8"], 4, 8, "checked for 8 processes, as text 0 says"),
        (["--dry-run"], ["processes: 8", "processes: 16"], 4, 16, "as text 1 says"),
        (["--dry-run"], ["processes: 8", "summary: no number"], 4, 8, "as text 0 says"),
        (
            ["--dry-run"],
            ["processes: 8"],
            3,
            3,
            "the fewest of this layout, as the 8 that text 0 says is no multiple of it",
        ),
        (["--dry-run"], ["processes: many"], 1, 1, ""),
        (["--dry-run"], ["[not, YAML"], 1, 1, ""),
        (["--dry-run", "--world-size", "12"], ["processes: 8"], 4, 12, ""),
    ],
)
def test_the_number_of_processes(argv, texts, layout, number, line):
    own = (*flags.RUN_FLAGS, flags.Flag("--world-size", {"world_size": flags.VALUE}))
    named = [(f"text {at}", f"about:\n  {text}\n") for at, text in enumerate(texts)]
    config = RunConfig().replace(tensor_model_parallel_size=layout)
    found, told = number_of_processes(flags.read(argv, own), named)(config)
    assert found == number and (line in told if line else told == "")


def test_a_run_loaded_by_the_name_of_its_own_folder_may_be_empty(tmp_path):
    """As training has it: --load RUN means RUN/checkpoints, which is the run's own."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    config = RunConfig().replace(load=str(tmp_path / "run"), run_dir=str(tmp_path / "run"))
    assert not [line for line in missing(config) if line.startswith("--load")]
