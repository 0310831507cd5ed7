"""What the towers of a new bi-encoder begin with: the weights of a BERT, which --bert-load names."""

from __future__ import annotations

import dataclasses
import re

from megalith.checkpoint.formats import foreign
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem
from megalith.config.architectures import BERT
from megalith.config.flags.text import Words
from megalith.config.parameter_kinds import tower_name
from megalith.config.parameters import parameter_shapes, towers
from megalith.config.run import RunConfig
from megalith.training.resume.source import source_of

OWN_HEADS = ("pooler.", "head_", "head.", "order_head.", "classifier.")  # parameters of BERTs that no tower has
# Fields of the model that a tower does not have, or that a BERT does not have.
NOT_COMPARED = (
    "model_type", "biencoder_projection_dim", "biencoder_shared_query_context_model", "num_classes",
    "classifier_dropout", "untie_embeddings_and_output_weights",
)  # fmt: skip


def read_towers(config: RunConfig) -> Weights | None:
    """The weights of --bert-load under the names of every tower, without projections; None where a run resumes, or
    does not name it.

    Raises CheckpointError where there is no BERT.
    """
    load = config.retriever.bert_load
    if load is None or source_of(config) is not None:
        return None
    assumed = vars(config.model) | {"model_type": BERT.name}
    try:
        bert = foreign.read(load, foreign.read_options(config, iteration=None, assumed=assumed))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("--load", "--bert-load")) from None
    record = bert.config.model.architecture
    if record.causal or record.decoder:
        rule, cure = "must be a BERT, as the towers are", "Name the run, or the folder, of one"
        raise CheckpointError(problem(f"--bert-load {load}", Words(f"a {record.name}"), rule, cure))
    tensors: dict[str, Lazy] = {}
    for name, lazy in bert.tensors.items():
        part, _, parameter = name.partition("/")
        if part == "model" and not parameter.startswith(OWN_HEADS):
            tensors |= {f"model/{tower_name(tower, parameter)}": lazy for tower in towers(config.model)}
    own = {name: getattr(config.model, name) for name in NOT_COMPARED}
    return dataclasses.replace(bert, config=bert.config.replace(**own), tensors=tensors)


def projections(config: RunConfig) -> list[str]:
    """The parameters of a bi-encoder that no BERT has, which are drawn."""
    return [name for name in parameter_shapes(config.model) if re.search(r"_head\.projection\.", name)]
