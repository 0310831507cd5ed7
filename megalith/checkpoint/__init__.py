"""Weights and state in and out of files: any layout saves, any layout loads.

    save(folder, 100, {"model/embedding.weight": tensor}, train_state={...}, config_yaml=text)
    train_state = load(folder, {"model/embedding.weight": tensor})       # fills the tensors in place

Each function is imported when it is first used, so that those which only read folders do not wait for torch.
"""

import importlib

_MODULE_OF = {
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
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    """Import one of the names above on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'megalith.checkpoint' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"megalith.checkpoint.{_MODULE_OF[name]}"), name)
