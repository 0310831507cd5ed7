"""The secret that requests must bring, from a file that only its owner can read. Nothing here imports torch."""

from __future__ import annotations

import os
import pathlib
import stat

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words


def read_token(path: str) -> str:
    """The token of a file of one line. Raises ConfigError for a file that others can read, or without a token."""
    file, cure = pathlib.Path(path), f"Write one with: (umask 077; openssl rand -hex 32 > {path})"
    if not file.is_file():
        raise ConfigError(problem("--token-file", path, "must name a file that exists", cure))
    mode = stat.S_IMODE(file.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        rule, found = "must be readable by its owner alone", Words(f"{path} with mode {mode:03o}")
        raise ConfigError(problem("--token-file", found, rule, f"Run: chmod 600 {path}"))
    try:
        token = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        rule, found = "must be a readable file of ASCII characters", Words(f"{path} ({type(error).__name__})")
        raise ConfigError(problem("--token-file", found, rule, cure)) from None
    if not token or not token.isprintable() or " " in token:
        rule, found = "must hold one line with a token without spaces", Words(f"{path}, which does not")
        raise ConfigError(problem("--token-file", found, rule, cure))
    return token
