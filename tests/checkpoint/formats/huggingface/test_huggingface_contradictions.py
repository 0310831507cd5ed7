"""A config.json that states one fact in two fields is read as transformers reads it; a note names differences."""

import json
import pathlib
from typing import Any

import pytest
import torch
import transformers

from megalith.checkpoint import formats
from tests.checkpoint.formats.huggingface.test_huggingface_tied import logits, megalith_logits
from tests.originals.families import MODELS

HALVED = {"type": "linear", "factor": 2.0}
ABSENT = object()
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {  # the family, changes of config.json, the note
    "stretch": (
        "llama",
        {"rope_scaling": HALVED},
        "rope_scaling {'type': 'linear', 'factor': 2.0} and rope_parameters {'rope_theta': 1",
    ),
    "stretch, Falcon": (
        "falcon 7b",
        {"rope_scaling": HALVED},
        "rope_scaling {'type': 'linear', 'factor': 2.0} and rope_parameters",
    ),
    "stretch, the same": (
        "llama",
        {"rope_scaling": HALVED, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        None,
    ),
    "base": ("llama", {"rope_theta": 100.0}, "rope_parameters: rope_theta 10000.0 and rope_theta 100.0"),
    "base, the same": ("llama", {"rope_theta": 10000}, None),
    "share": ("neox", {"rotary_pct": 1.0}, "rope_parameters: partial_rotary_factor 0.5 and rotary_pct 1.0"),
    "base, NeoX": (
        "neox",
        {"rotary_emb_base": 90, "rope_theta": 50, "rotary_pct": 1.0, "rope_parameters": ABSENT},
        None,
    ),
    "heads": ("gpt2", {"num_attention_heads": 2}, "num_attention_heads 2 and n_head 4"),
    "activation": (
        "gemma",
        {"hidden_act": "relu", "hidden_activation": "gelu"},
        "hidden_act 'relu' and hidden_activation 'gelu'",
    ),
    "activation, one": (
        "gemma",
        {"hidden_act": ABSENT, "hidden_activation": "relu"},
        "'gelu_pytorch_tanh' and hidden_activation 'relu'",
    ),
    "activation of the releases": (
        "gemma",
        {"hidden_act": "gelu"},
        "Gemma's class 'gelu_pytorch_tanh' and hidden_act 'gelu'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_config_json_that_differs_from_itself(case: str, tmp_path: pathlib.Path) -> None:
    name, changes, expected = CASES[case]
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in content.items() if value is not ABSENT})
    )
    notes = [note for note in formats.read(tmp_path).notes if "differs from itself" in note]
    assert len(notes) == bool(expected), notes
    assert all((expected or "") in note and "transformers 5" in note for note in notes), notes
    assert transformers.__version__.startswith("5")
    wanted = logits(tmp_path)
    assert (megalith_logits(tmp_path) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
