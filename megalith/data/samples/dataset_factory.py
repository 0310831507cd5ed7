"""How the built-in datasets are made from a run's config: arguments that all of them take, and those of one class."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from megalith.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class DatasetFactory:
    """Called by data/build.py as any dataset of the registry is; returns a `dataset` made from the config."""

    dataset: Callable[..., Any]
    options: Callable[[RunConfig, Any], dict[str, Any]]  # (config, tokenizer) -> keyword arguments of this class alone
    splits_documents: bool = False  # see DATASETS in data/build.py
    finish: Callable[..., dict[str, Any]] | None = None  # see DATASETS in data/build.py

    def __call__(
        self,
        indexed: Any,
        documents: tuple[int, int] | None,
        num_samples: int | None,
        *,
        config: RunConfig,
        tokenizer: Any,
        seed: int,
        cache_folders: Sequence[str | os.PathLike] = (),
    ) -> Any:
        """The dataset over these documents of `indexed`."""
        return self.dataset(
            indexed,
            documents,
            num_samples,
            seq_length=config.data.seq_length or 0,
            seed=seed,
            cache_folders=cache_folders,
            **self.options(config, tokenizer),
        )


@dataclasses.dataclass(frozen=True)
class FilesFactory:
    """How the datasets of a task's files are made; see DATASETS in data/build.py.

    open_files: (config, tokenizer) -> (training dataset or None, {name: validation dataset}). Such a dataset has a
    length and may have `labelled`, `files` (what it was read from) and `describe` (lines for the user).
    """

    open_files: Callable[[RunConfig, Any], tuple[Any, dict[str, Any]]]
