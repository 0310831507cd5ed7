"""Environment variables of Accelerate's launcher."""

import pytest

from megalith.common import environment
from megalith.common.errors import ConfigError


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("TRUE", True), ("1", True), ("off", False), ("N", False)])
def test_truth_as_accelerate_reads_it(text, value):
    assert environment.truth(text) is value
    assert environment.truth("maybe") is None


def test_a_boolean_is_a_text_of_truth_or_not_set(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_MEGATRON_LM", raising=False)
    assert environment.uses_megatron_lm() is False
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    assert environment.uses_megatron_lm() is True
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "maybe")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_MEGATRON_LM must be true or false"):
        environment.uses_megatron_lm()


def test_options_of_megatron_lm_without_those_that_are_not_set(monkeypatch):
    for name, text in {"TP_DEGREE": "2", "PP_DEGREE": "None", "RECOMPUTE_METHOD": ""}.items():
        monkeypatch.setenv(f"MEGATRON_LM_{name}", text)
    found = environment.megatron_lm_options()
    assert found["tp_degree"] == "2" and not {"pp_degree", "recompute_method"} & found.keys()
