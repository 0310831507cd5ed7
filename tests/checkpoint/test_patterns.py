"""Names with numbers of layers and experts in them, in both kinds of tables."""

from megalith.checkpoint.formats.huggingface.family import Rule
from megalith.checkpoint.formats.megatron.names import ParamMapping, mappings_of_names, mappings_of_parameters
from megalith.checkpoint.patterns import match_numbers
from megalith.config.sections.model import ModelConfig


def test_numbers_of_a_name() -> None:
    assert match_numbers("layers.{layer}.experts.{expert}.up", "layers.3.experts.12.up") == {"layer": 3, "expert": 12}
    assert match_numbers("layers.{layer}.up", "layers.3.down") is None
    assert match_numbers("layers.{layer}.up", "layersX3.up") is None
    assert match_numbers("head", "head") == {} and match_numbers("layers.{layer}.up", "layers.x.up") is None


EXPERTS = {f"layers.{layer}.mlp.experts.{expert}.up.weight": (4, 2) for layer in (0, 1) for expert in (0, 1, 2)}


def test_a_rule_of_experts() -> None:
    rule = Rule("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3", "layers.{layer}.mlp.experts.{expert}.up")
    found = dict(rule.pairs(EXPERTS, ModelConfig()))
    assert len(found) == 6
    assert found["model.layers.1.block_sparse_moe.experts.2.w3.weight"] == ("layers.1.mlp.experts.2.up.weight",)


def test_rows_of_experts_both_ways() -> None:
    theirs = "encoder.layers.{layer}.mlp.experts.{expert}.dense_h_to_4h.weight"
    row = ParamMapping(theirs, ("layers.{layer}.mlp.experts.{expert}.up.weight",), "rows")
    norm = ParamMapping("encoder.layers.{layer}.norm.weight", ("layers.{layer}.norm.weight",), "replicated")
    made = mappings_of_parameters([norm, row], [*EXPERTS, "layers.0.norm.weight", "layers.1.norm.weight"], 2)
    names = [each.megatron_name for each in made]
    assert names[0] == "encoder.layers.0.norm.weight" and names[4] == "encoder.layers.1.norm.weight"
    assert names[3] == "encoder.layers.0.mlp.experts.2.dense_h_to_4h.weight" and len(names) == 8
    assert mappings_of_names([norm, row], names) == made
