"""Packages that megalith needs only for some features, and the one message on a missing one."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from megalith.common.errors import ConfigError

EXTRAS = {  # package -> what pip installs, and the extra of pyproject.toml that brings it (a test compares the two)
    "zstandard": ("zstandard>=0.23", "data"),
    "pyarrow": ("pyarrow>=17", "data"),
    "sentencex": ("sentencex>=1.0", "data"),
    "gigatoken": ("gigatoken>=0.10", "data"),
    "sentencepiece": ("sentencepiece>=0.2", "data"),
    "tiktoken": ("tiktoken>=0.8", "data"),
    "ftfy": ("ftfy>=6.3", "corpus"),
    "rensa": ("rensa>=0.5", "corpus"),
    "py3langid": ("py3langid>=0.4", "corpus"),
    "mwparserfromhell": ("mwparserfromhell>=0.7", "corpus"),
    "tldextract": ("tldextract>=5.3", "corpus"),
    "trafilatura": ("trafilatura>=2.0", "corpus"),
    "lxml_html_clean": ("lxml_html_clean>=0.4", "corpus"),
    "urllib3": ("urllib3>=2.6", "corpus"),
    "tensorboard": ("tensorboard>=2.18", "track"),
    "faiss": ("faiss-cpu>=1.9", "retrieval"),
    "ray": ("ray>=2.40", "ray"),
    "transformers": ("transformers>=5.0", "hf"),
    "accelerate": ("accelerate>=1.10", "hf"),
    "fastapi": ("fastapi>=0.115", "serve"),
    "uvicorn": ("uvicorn>=0.34", "serve"),
    "httptools": ("httptools>=0.6", "serve"),
    "prometheus_client": ("prometheus_client>=0.21", "serve"),
    "jinja2": ("jinja2>=3.1", "serve"),
    "lm_eval": ("lm_eval>=0.4.9", "eval"),
}


class MissingPackage(ConfigError):
    """A feature needs a package that is not installed, or that cannot be imported."""


def require(module: str, purpose: str, package: str | None = None) -> Any:
    """Import `module`, of a package of EXTRAS or in need of one (`package`).

    Raises MissingPackage that says what for (`purpose`) and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(missing_message(package or module.partition(".")[0], purpose, error)) from error


def missing_package(package: str, purpose: str) -> str | None:
    """The text of require's error where `package` is not installed, else None; nothing is imported."""
    return missing_message(package, purpose) if importlib.util.find_spec(package) is None else None


def missing_message(package: str, purpose: str, error: ImportError | None = None) -> str:
    """The message on a package: what needs it, what is wrong, how to install it. error: what importing it raised."""
    requirement, extra = EXTRAS[package]
    broken = error is not None and getattr(error, "name", None) not in (package, None)
    state = f"cannot be imported ({error})" if broken else "is not installed"
    # Not 'megalith[extra]' alone: a registry would be asked for that name, and may know another project by it.
    return (
        f"{purpose} needs the package {package}, which {state}. Install it with pip install '{requirement}'; "
        f"in a clone, pip install '.[{extra}]' brings all that is of its kind."
    )
