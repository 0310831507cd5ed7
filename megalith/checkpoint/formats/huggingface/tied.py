"""Tensors of Hugging Face that are one where config.json ties them, and files that have them more than once.

The rule is that of transformers 5 (PreTrainedModel.tie_weights): equal ones are one; a single one is used for all; of two that
differ config.json is wrong, and they stay two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import TAKE, UNTIE, Family
from megalith.checkpoint.formats.huggingface.files import same
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.common.errors import CheckpointError, problem

UNTIED = "untie_embeddings_and_output_weights"


def resolve_ties(
    found: Mapping[str, Lazy], family: Family, values: Mapping[str, Any]
) -> tuple[dict[str, Lazy], dict[str, Any], list[str]]:
    """(tensors, fields of our config that they change, what to tell) of a folder's tensors under their names.

    values: fields of our config, as config.json and the user say. Raises CheckpointError where a copy of the embedding has been
    trained to something else and the model has no place for it.
    """
    found, changed, notes = dict(found), dict[str, Any](), list[str]()

    def stored(name: str) -> str | None:
        return next((each for each in (name, name.removeprefix(family.prefix)) if each in found), None)

    for copy, (original, differing) in family.copies.items():
        own, first = stored(copy), stored(original)
        if own is None or (differing == UNTIE and values.get(UNTIED)):
            continue
        if first is None:
            found[original] = found.pop(own)
            notes.append(f"{original} is not in this folder: it is read from {own}, which is tied to it")
        elif same(found[own], found[first]):
            del found[own]
        elif differing == UNTIE:
            changed[UNTIED] = True
            notes.append(f"config.json ties {own} to {first}, but they differ: they are two here, as in transformers 5")
        elif differing == TAKE:
            found[first] = found.pop(own)
            notes.append(f"{own} and {first} differ: the first is read, with which transformers computes")
        else:
            rule = f"{family.architecture} has one tensor for both, and theirs differ"
            cure = "Copy the files again, of one version; a model that was trained with two cannot be converted"
            raise CheckpointError(problem("weights", f"{own} and {first}", rule, cure))
    return found, changed, notes
