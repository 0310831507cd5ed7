"""The page of a checkpoint; what it shows of whole checkpoints is in tests/cli/test_checkpoint.py."""

from megalith.workflows.checkpoint_report import format_numbers


def test_format_numbers() -> None:
    assert [format_numbers(numbers) for numbers in ([0, 1, 2], [0, 2], [4])] == ["0-2", "0,2", "4"]
