"""The public Python names of megalith: those that `dir` lists, their options, and that the package has type hints."""

import inspect
import pathlib

import megalith
from megalith.cli.generate import register
from megalith.generation.generate import complete, generate


def test_names_and_options_are_listed():
    assert {"generate", "load", "train"} <= set(dir(megalith))
    assert (pathlib.Path(megalith.__file__).parent / "py.typed").exists()
    options = inspect.signature(generate).parameters
    assert not [name for name, one in options.items() if one.kind is one.VAR_KEYWORD]
    for name, one in options.items():
        assert name in generate.__doc__, name
        same = inspect.signature(complete).parameters.get(name)
        assert same is None or same.default == one.default, name


def test_the_command_line_has_the_same_options():
    import argparse

    verbs = argparse.ArgumentParser().add_subparsers()
    register(verbs)
    flags = {action.dest for action in verbs.choices["generate"]._actions}
    python = set(inspect.signature(generate).parameters) - {"model", "prompts", "stop_at_eod", "add_bos", "on_token"}
    assert python <= flags
