"""Megalith's config, the plugin and what is known of the model, as the `args` that Megatron's train steps read."""

from __future__ import annotations

import types
from typing import Any

from megalith.config.flags.text import nearest
from megalith.integrations.accelerate.session import Session


class StepArguments(types.SimpleNamespace):
    """args.seq_length, args.eod_mask_loss ...; an unknown name raises AttributeError with the nearest."""

    def __getattr__(self, name: str) -> Any:
        near = None if name.startswith("__") else nearest(name, vars(self))
        raise AttributeError(f"there is no argument {name}" + (f"; did you mean {near}?" if near else ""))


def step_arguments(session: Session) -> StepArguments:
    """What a train step of the user's is made with.

    By Megatron's names: the fields of the run's config and of the plugin, the plugin's megatron_lm_default_args, and
    what Accelerate's steps read beside them.
    """
    plugin, config, hf = session.plugin, session.config, session.hf_config
    flat = config.flat()
    values = {name: value for name, value in vars(plugin).items() if not name.startswith("_")}
    values |= {name: value for name, value in flat.items() if value is not None or name not in values}
    values |= {name: value for name, value in plugin.megatron_lm_default_args.items() if value is not None}
    classifies, eos = session.kind == "bert_classification", getattr(hf, "eos_token_id", None)
    mesh = session.runtime.mesh
    values |= {
        "session": session,
        "model_type_name": session.kind.partition("_")[0],
        "pretraining_flag": not classifies,
        "num_labels": hf.num_labels if classifies else 2,
        "bert_binary_head": session.kind == "bert" and not config.model.bert_no_binary_head,
        "model_return_dict": getattr(hf, "return_dict", True),
        "eos_token_id": eos[0] if isinstance(eos, list) else eos,
        "orig_vocab_size": config.model.vocab_size,
        "rank": mesh.global_rank,
        "world_size": mesh.world_size,
        "data_parallel_size": mesh.data_size,
    }
    return StepArguments(**values)
