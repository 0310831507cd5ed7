"""The names of accelerate.utils: `from megalith.accelerate.utils import MegatronLMPlugin`. See names.py."""

from typing import Any

from megalith.accelerate import names

__all__ = names.public("accelerate.utils")


def __dir__() -> list[str]:
    """The names before they are imported too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """One of the names, on first use (PEP 562)."""
    return names.find("accelerate.utils", name)
