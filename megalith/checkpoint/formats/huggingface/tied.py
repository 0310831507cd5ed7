"""Tied tensors of Hugging Face folders, of which the files may have several copies.

The rule is that of transformers 5 (PreTrainedModel.tie_weights): equal copies are one tensor; a single copy is used for
all names; where an output layer differs from the embedding config.json is wrong, and they stay two tensors. Of other
pairs megalith's model has one parameter: TiedTo.if_different says what is read where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import UNTIE, USE_TIED, Family
from megalith.checkpoint.formats.huggingface.files import equal_tensors
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

UNTIED_FIELD = "untie_embeddings_and_output_weights"


def resolve_ties(
    found: Mapping[str, Lazy], family: Family, values: Mapping[str, Any]
) -> tuple[dict[str, Lazy], dict[str, Any], list[str]]:
    """(tensors, fields of the config that they change, notes) of a folder's tensors under Hugging Face's names.

    values: fields of RunConfig, from config.json and the user. Raises CheckpointError where a tied tensor differs from
    the original and family.tied says REFUSE.
    """
    found, changed, notes = dict(found), dict[str, Any](), list[str]()

    def stored(name: str) -> str | None:
        return next((each for each in (name, name.removeprefix(family.prefix)) if each in found), None)

    for tied_name, (original_name, if_different) in family.tied.items():
        tied, original = stored(tied_name), stored(original_name)
        if tied is None or (if_different == UNTIE and values.get(UNTIED_FIELD)):
            continue
        if original is None:
            found[original_name] = found.pop(tied)
            notes.append(f"{original_name} is not in this folder: it is read from {tied}, which is tied to it")
        elif equal_tensors(found[tied], found[original]):
            del found[tied]
        elif if_different == UNTIE:
            changed[UNTIED_FIELD] = True
            notes.append(
                f"config.json ties {tied} to {original}, but they differ: they are two here, as in transformers 5"
            )
        elif if_different == USE_TIED:
            found[original] = found.pop(tied)
            notes.append(f"{tied} and {original} differ: the first is read, with which transformers computes")
        else:
            rule = f"must have equal tensors where {family.architecture} has one for both"
            cure = "Copy the files again, of one version; a model that was trained with two cannot be converted"
            raise CheckpointError(problem("The weights", Words(f"{tied} and {original}, which differ"), rule, cure))
    return found, changed, notes
