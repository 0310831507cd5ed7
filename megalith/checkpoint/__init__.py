"""Weights and state in and out of files: any layout saves, any layout loads.

    save(folder, 100, {"model/embedding.weight": tensor}, train_state={...}, config_yaml=text)
    train_state = load(folder, {"model/embedding.weight": tensor})       # fills the tensors in place

The words are imported when first used: those that only look at folders do not wait for torch.
"""

import importlib

_WORDS = {
    "save": "store.saving",
    "Saver": "store.saver",
    "load": "store.loading",
    "fill": "store.loading",
    "read_full": "store.loading",
    "read_tensors": "store.loading",
    "iterations": "store.folder",
    "latest": "store.folder",
    "find": "store.folder",
    "verify": "store.manifest",
    "describe": "store.facts",
    "read_config": "store.facts",
    "read_train_state": "store.facts",
    "edit": "store.editing",
}
__all__ = sorted(_WORDS)


def __getattr__(name: str):
    """Import one of the words above on first use (PEP 562)."""
    if name not in _WORDS:
        raise AttributeError(f"module 'megalith.checkpoint' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"megalith.checkpoint.{_WORDS[name]}"), name)
