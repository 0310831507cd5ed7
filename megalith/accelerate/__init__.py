"""Accelerate for scripts whose model trains on megalith: `from megalith.accelerate import Accelerator`.

The names of the package accelerate, of its utils and of its logging, where they lie there; what the Megatron-LM plugin
makes different is megalith's (names.py). Needs the package accelerate.
"""

from typing import Any

from megalith.accelerate import names

__all__ = names.public("accelerate")


def __dir__() -> list[str]:
    """The names before they are imported too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """One of the names, on first use (PEP 562)."""
    return names.find("accelerate", name)
