"""The state of all random number generators that a sampler, a dataset or a collate function may draw from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]  # numbers, text and tensors alone, so that torch.load reads it with weights_only


def get_random_state(generators: Sequence[torch.Generator] = ()) -> RandomState:
    """That of Python's, NumPy's and torch's global generators, and of `generators`."""
    kind, key, *position = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(key).tolist(), *position),
        "torch": torch.get_rng_state(),
        "generators": [each.get_state() for each in generators],
    }


def set_random_state(state: RandomState, generators: Sequence[torch.Generator] = ()) -> None:
    """Set what `get_random_state` returned; without `generators` the global ones alone."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for each, own in zip(generators, state["generators"]):
        each.set_state(own)
