"""megalith: large transformers, trained and converted in any parallel layout, from raw text to generated text.

    import megalith
    model = megalith.load(PATH)
    logits = model(input_ids)
    texts = megalith.generate(model, ["Once upon"], max_new_tokens=64, top_p=0.9, seed=1)
    for number, token, text in megalith.stream(model, "Once upon"): ...
    megalith.train(config)

These names are imported when first used, so that `import megalith` and `megalith --help` do not wait for torch.
"""

import importlib

__version__ = "0.1.0"

_MODULE_OF = {
    "GenerationParams": "megalith.generation.params",
    "complete": "megalith.generation.generate",
    "generate": "megalith.generation.generate",
    "generate_tokens": "megalith.generation.tensors",
    "load": "megalith.generation.load",
    "stream": "megalith.generation.generate",
    "train": "megalith.training.pretrain",
}
__all__ = ["GenerationParams", "complete", "generate", "generate_tokens", "load", "stream", "train"]


def __dir__() -> list[str]:
    """The names above too, before they are imported."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    """Import one of the names above on first use (PEP 562)."""
    if name not in _MODULE_OF:
        from megalith.config.flags.foreign_names import megalith_name

        instead = megalith_name(name)
        raise AttributeError(
            f"module 'megalith' has no attribute {name!r}; {instead or 'it has ' + ', '.join(__all__)}"
        )
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
