"""Weights and state in and out of files: any layout saves, any layout loads.

    save(folder, 100, {"model/embedding.weight": tensor}, train_state={...}, config_yaml=text)
    train_state = load(folder, {"model/embedding.weight": tensor})       # fills the tensors in place

The words are imported when first used: those that only look at folders do not wait for torch.
"""

import importlib

_WORDS = {
    "save": "saving",
    "Saver": "saver",
    "load": "loading",
    "fill": "loading",
    "read_full": "loading",
    "read_tensors": "loading",
    "iterations": "folder",
    "latest": "folder",
    "find": "folder",
    "verify": "manifest",
    "describe": "facts",
    "read_config": "facts",
    "read_train_state": "facts",
    "edit": "editing",
}
__all__ = sorted(_WORDS)


def __getattr__(name: str):
    """Import one of the words above on first use (PEP 562)."""
    if name not in _WORDS:
        raise AttributeError(f"module 'megalith.checkpoint' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"megalith.checkpoint.{_WORDS[name]}"), name)
