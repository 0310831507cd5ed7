"""megalith: large transformers, trained and converted in any parallel layout, from raw text to generated text.

    import megalith
    model = megalith.load(PATH)
    logits = model(input_ids)
    texts = megalith.generate(model, ["Once upon"], max_new_tokens=64, top_p=0.9, seed=1)
    megalith.train(config)

The words are imported when first used, so that `import megalith` and `megalith --help` do not wait for torch.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["generate", "load", "train"]

_WORDS = {
    "load": "megalith.generation.load",
    "generate": "megalith.generation.generate",
    "train": "megalith.training.pretrain",
}


def __dir__() -> list[str]:
    """The words above too, before they are imported."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    """Import one of the words above on first use (PEP 562)."""
    if name not in _WORDS:
        from megalith.config.flags.elsewhere import answer

        instead = answer(name)
        raise AttributeError(
            f"module 'megalith' has no attribute {name!r}; {instead or 'it has ' + ', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_WORDS[name]), name)
