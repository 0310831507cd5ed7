"""What a conversion is asked to do: the format that flags imply, sizes, and flags that have no effect."""

import pathlib

from megalith.workflows import conversion_request
from megalith.workflows.conversion_request import ConversionRequest, parse_size


def read(verb: str, **values) -> ConversionRequest:
    return conversion_request.read(verb, values, ["a", "b"], [], notice=lambda line: None)


def test_the_format_is_implied_by_verb_or_layout() -> None:
    assert read("import").to == "megalith" and read("reshape").to == "megatron"
    request = read("export", tensor_model_parallel_size="2", iteration="7", hidden_dropout="0.5")
    assert (request.to, request.source, request.folder) == ("megatron", "a", pathlib.Path("b"))
    expected = {"tensor_model_parallel_size": 2, "iteration": 7, "overrides": {"hidden_dropout": 0.5}}
    assert request.options == expected and request.notes == ()


def test_flags_of_the_optimizers_layout_need_an_optimizer() -> None:
    layout = {"data_parallel_size": "2", "use_distributed_optimizer": True}
    assert read("export", to="megatron", with_optimizer=True, **layout).notes == ()
    notes = read("export", to="huggingface", **layout).notes
    names = ("--use-distributed-optimizer", "--data-parallel-size")
    assert notes == tuple(f"{name} has no effect without --with-optimizer --to megatron" for name in names)


def test_sizes() -> None:
    sizes = {"200MB": 200_000_000, "5gb": 5_000_000_000, "2GiB": 2 << 30, "1.5KB": 1500, "77": 77}
    assert {text: parse_size(text, []) for text in sizes} == sizes
    problems: list[str] = []
    assert all(parse_size(text, problems) is None for text in ("", "0", "-1", "5 apples")) and len(problems) == 4
