"""Things found by name: built-in ones from a table, a user's as `module:name`, so that nobody needs a fork."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError


class Registry:
    """A read-only table of names to `module:attribute` addresses, imported only when asked for."""

    def __init__(self, kind: str, addresses: Mapping[str, str]):
        """`kind` is the word used in errors ("dataset"); `addresses` maps each short name to its address."""
        self.kind = kind
        self.addresses = dict(addresses)

    def __iter__(self):
        """Iterate over the short names."""
        return iter(self.addresses)

    def find(self, name: str) -> Any:
        """Return the object called `name`, a short name of the table or `module:attribute`.

        Raises ConfigError when there is none, naming the nearest.
        """
        address = self.addresses.get(name, name)
        if ":" not in address:
            near = difflib.get_close_matches(name, self.addresses, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"unknown {self.kind} {name!r}; {hint}the known ones are {', '.join(sorted(self.addresses))}, "
                f"and your own goes by 'module:name'"
            )
        return load(f"{self.kind} {name!r}", address)


def load(what: str, address: str) -> Any:
    """The object at `address`, `module:attribute`. what: its description in the ConfigError where it is not there."""
    module, _, attribute = address.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: of an empty name
        raise ConfigError(
            f"{what} cannot be imported ({error}); {module!r} must be on the Python path "
            f"(PYTHONPATH, or an installed package) and define {attribute!r}"
        ) from error
