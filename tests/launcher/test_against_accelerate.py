"""Accelerate's own launcher: every key and flag that it has is known here, and sets the same variables."""

import argparse
import dataclasses
import os

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env, str_to_bool

from megalith.cli import launch as verb
from megalith.config.flags.flags import CommandLine
from megalith.config.flags.text import flag
from megalith.launcher import accelerate_yaml
from megalith.launcher.accelerate_config import keys
from tests.launcher.files import GUIDE

# Flags of libraries that are not started here, beyond the one that chooses the library: unknown ones, with that help.
OTHERS = ("deepspeed_", "fsdp_", "fp8_", "parallelism_config_", "offload_", "zero3_", "tpu_", "aws_")
TPU_PODS = {"vm", "env"}


def test_every_key_is_known():
    names = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert names - set(accelerate_yaml._top_level()) == set()


def options():
    return [action for action in launch_command_parser()._actions if action.option_strings]


def test_every_flag_is_known():
    known = {name.replace("-", "_") for name in verb._table()}
    left = {
        action.dest for action in options() if not {each.replace("-", "_") for each in action.option_strings} & known
    }
    assert {name for name in left if not name.startswith(OTHERS)} == TPU_PODS


def test_the_values_of_flags_are_taken_alike():
    """A flag that has a value there and none here would take the script for it."""
    for action in options():
        found = verb._table().get(flag(action.dest))
        if found:
            assert (found.nargs == 0) == (action.nargs == 0), action.dest


def test_the_guides_file_sets_the_same_variables(tmp_path, monkeypatch):
    file = tmp_path / "guide.yaml"
    file.write_text(GUIDE)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "MEGATRON_LM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "--main_process_port", "0", "s.py"])
    )
    theirs = prepare_multi_gpu_env(args)
    config, _ = accelerate_yaml.resolve(file, CommandLine())
    ours = config.environment()
    assert ours.pop("ACCELERATE_USE_CPU") == "false"  # Accelerate does not say it, and no is its default
    for name, value in ours.items():
        assert _comparable(theirs[name]) == _comparable(value), name
    missing = {name for name in theirs if name.startswith(("ACCELERATE_", "MEGATRON_LM_"))} - ours.keys()
    assert all(name.startswith("ACCELERATE_DYNAMO_") or theirs[name] == "False" for name in missing), missing


def _comparable(text):
    try:
        return str_to_bool(text) if not text.isdecimal() else text
    except ValueError:
        return text.lower()


def test_megatron_keys_are_those_of_its_flags():
    parser: argparse.ArgumentParser = launch_command_parser()
    theirs = {action.dest for action in parser._actions if action.dest.startswith("megatron_lm_")}
    assert theirs == {name for name in keys() if name.startswith("megatron_lm_")}


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MEGATRON_LM"])
def test_accelerate_reads_what_is_written_here(tmp_path, kind):
    config, _ = accelerate_yaml.resolve(
        None, CommandLine(values={"distributed_type": kind, "num_processes": "1", "use_cpu": True, "debug": True})
    )
    file = tmp_path / "config.yaml"
    file.write_text(accelerate_yaml.to_yaml(config))
    found = ClusterConfig.from_yaml_file(str(file))
    assert found.distributed_type == kind and found.num_processes == 1 and found.use_cpu and found.debug
