"""A RunConfig from a Hugging Face config.json alone, without weights."""

from __future__ import annotations

import pathlib

from megalith.checkpoint.formats.huggingface import contradictions, files
from megalith.checkpoint.formats.huggingface.conversion import CONFIG, family_of
from megalith.checkpoint.formats.huggingface.family import CONFIG_SCHEMA
from megalith.common.errors import CheckpointError, problem
from megalith.config.architectures import architecture
from megalith.config.checks.model import form_problems
from megalith.config.flags.text import fail
from megalith.config.run import RunConfig
from megalith.config.source_fields import checked


def read_config(path: pathlib.Path) -> tuple[RunConfig, list[str]]:
    """The config of a config.json or of its folder, and notes. Raises CheckpointError for what is not implemented."""
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        cure = "Name a config.json, or the folder that has one"
        raise CheckpointError(problem("--from-huggingface", str(path), "must have a config.json", cure))
    given = checked(files.read_json(file), CONFIG_SCHEMA, str(file))
    _, family = family_of(given, file)
    notes = contradictions.find_contradictions(given, family.aliases)
    given = family.checked(given, str(file))
    values = family.config_from_hf(given, str(file))
    values |= {"seq_length": values.get("max_position_embeddings")}
    config = RunConfig().replace(**{**architecture(values["model_type"]).defaults, **values})
    fail((f"{file}: {each.text}" for each in form_problems(config)), CheckpointError)
    return config, [*notes, "dropout and tying are as config.json says; the weights may say otherwise of tying"]
