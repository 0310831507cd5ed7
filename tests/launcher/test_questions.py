"""The questions of accelerate config: the guide's answers give the guide's file."""

import io
import sys

import pytest

from megalith.common.errors import ConfigError
from megalith.launcher import questions
from megalith.launcher.accelerate_yaml import to_yaml
from tests.launcher.files import ANSWERS, GUIDE


@pytest.fixture
def ask(monkeypatch):
    """Asks with these answers."""

    def ask(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return questions.ask()

    return ask


def test_the_guides_answers_give_the_guides_file(ask, capsys):
    assert to_yaml(ask(ANSWERS)) == GUIDE
    asked = capsys.readouterr().out
    order = (
        "compute environment", "type of machine", "number of machines", "DeepSpeed", "FullyShardedDataParallel",
        "Megatron-LM", "tensor parallelism", "sequence parallelism", "pipeline parallelism", "micro-batches",
        "recomputation", "distributed optimizer", "gradient clipping", "number of GPU(s)", "mixed precision",
    )  # fmt: skip
    places = [asked.index(words) for words in order]
    assert places == sorted(places)
    assert "use Megatron-LM [yes/NO]" in asked and "sequence parallelism [YES/no]" in asked and "L2 norm" in asked


def test_defaults_of_an_ended_input(ask):
    config = ask("")
    assert (config.distributed_type, config.processes, config.use_cpu, config.mixed_precision) == ("NO", 1, False, "no")


def test_questions_depend_on_answers(ask, capsys):
    config = ask("0\nmulti-CPU\n\nyes\n1\n1\nno\nno\n0\n2\n\n")
    assert (config.distributed_type, config.use_cpu, config.processes) == ("MEGATRON_LM", True, 2)
    assert config.megatron_lm_gradient_clipping == 0.0 and config.megatron_lm_recompute_activations is False
    assert config.megatron_lm_sequence_parallelism is None and config.megatron_lm_num_micro_batches is None
    asked = capsys.readouterr().out
    assert not any(words in asked for words in ("DeepSpeed", "sequence parallelism", "micro-batches", "GPU(s)"))


def test_wrong_answers_are_asked_again(ask, capsys):
    text = "1\n0\n3\nx\n2\n\nyes\nno\n\nyes\n2\nmaybe\n\n3\n\n\n\n-1\n\n4\n6\nfp8\nBF16\n"
    config = ask(text)
    assert (config.processes, config.mixed_precision, config.megatron_lm_pp_degree) == (6, "bf16", 3)
    said = capsys.readouterr().out
    for words in (
        "not here: start it there",
        "not here: Write MULTI_CPU, MULTI_GPU or MEGATRON_LM",
        "from 0 to 3; found 'x'",
        "DeepSpeed is not started here. Write MEGATRON_LM",
        "yes or no; found 'maybe'",
        "at least 0; found '-1'",
        "must be a multiple of 6",
        "found 'fp8'",
    ):
        assert words in said, words


def test_several_machines(ask, capsys):
    config = ask("0\n2\n2\n2\n1\n\n10.0.0.1\n99999\n29501\nno\nc10d\n\n\n\n8\n\n")
    assert (config.num_machines, config.machine_rank, config.main_process_ip) == (2, 1, "10.0.0.1")
    assert (config.main_process_port, config.rdzv_backend, config.processes_here) == (29501, "c10d", 4)
    said = capsys.readouterr().out
    assert "from 0 to 1" in said and "all machines need it" in said and "from 1 to 65535" in said


def test_an_address_has_no_default(ask):
    with pytest.raises(ConfigError, match="address of machine 0 must be given"):
        ask("0\n2\n2\n1\n")
