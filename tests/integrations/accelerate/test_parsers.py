"""Which models of transformers are taken, what they become, and a script's own parsers."""

import types

import accelerate.utils.dataclasses as accelerate_parsers
import pytest
import torch
import transformers
from torch import nn

from megalith.common.errors import ConfigError
from megalith.integrations.accelerate import parsers
from megalith.integrations.accelerate.config import run_config
from megalith.integrations.accelerate.plugin import MegatronLMPlugin
from megalith.runtime.load import weights_of
from tests.integrations.accelerate.helpers import toy_model

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Parsers that a test registers are forgotten after it."""
    registry = dict(accelerate_parsers.MODEL_CONFIGS_TO_MEGATRON_PARSERS)
    monkeypatch.setattr(accelerate_parsers, "MODEL_CONFIGS_TO_MEGATRON_PARSERS", registry)
    monkeypatch.setattr("megalith.common.environment.megatron_lm_options", dict)


def model_of(name, config, **given):
    """A model of transformers by the names of its classes, on the meta device."""
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**given))


def refused(model):
    with pytest.raises(ConfigError) as caught:
        parsers.check_model(model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "head", "expected"),
    [
        ("gpt2", None, "gpt"), ("llama", None, "gpt"), ("bert", "pretraining", "bert"), ("bert", "masked", "bert"),
        ("megatron-bert", "pretraining", "bert"), ("megatron-bert", "masked", "bert"),
        ("megatron-bert", "classification", "bert_classification"), ("bert", "classification", "bert_classification"),
        ("t5", None, "t5"), ("mt5", None, "t5"),
    ],
)  # fmt: skip
def test_supported_classes_and_their_kinds(kind, head, expected):
    model = toy_model(kind, head)
    parsers.check_model(model)
    assert parsers.kind_of(model) == expected == weights_of(model).config.model.model_type


@pytest.mark.parametrize(
    ("name", "config", "sizes"),
    [
        ("BloomForCausalLM", "BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("FalconForCausalLM", "FalconConfig", SIZES),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
        ("MistralForCausalLM", "MistralConfig", SIZES),
        ("Qwen2ForCausalLM", "Qwen2Config", SIZES),
        ("Qwen3ForCausalLM", "Qwen3Config", SIZES),
        ("GemmaForCausalLM", "GemmaConfig", SIZES),
    ],
)
def test_other_families_are_gpts(name, config, sizes):
    model = model_of(name, config, **sizes)
    parsers.check_model(model)
    assert parsers.kind_of(model) == "gpt"


@pytest.mark.parametrize(
    ("name", "config", "sizes", "ends"),
    [
        ("GPT2ForSequenceClassification", "GPT2Config", GPT2_SIZES, "...ForCausalLM or ...LMHeadModel"),
        ("GPT2Model", "GPT2Config", GPT2_SIZES, "...ForCausalLM or ...LMHeadModel"),
        ("BertModel", "BertConfig", SIZES, "...ForMaskedLM or ...ForSequenceClassification"),
        ("BertForTokenClassification", "BertConfig", SIZES, "...ForPreTraining"),
        ("MegatronBertForCausalLM", "MegatronBertConfig", SIZES, "...ForPreTraining"),
    ],
)
def test_other_heads_are_refused_with_those_that_there_are(name, config, sizes, ends):
    message = refused(model_of(name, config, **sizes))
    assert ends in message and name in message and "section 10" in message


def test_other_families_and_other_objects_are_refused():
    message = refused(model_of("OPTForCausalLM", "OPTConfig", **SIZES, ffn_dim=64, word_embed_proj_dim=32))
    assert (
        "of the type opt" in message
        and "gpt2, llama" in message
        and "add_model_config_to_megatron_parser('opt')" in message
    )
    assert "must be a model of transformers" in refused(nn.Linear(2, 2))
    assert ".module" in refused(nn.DataParallel(toy_model("gpt2")))


def test_a_class_of_ones_own_is_refused_because_its_code_would_not_run():
    class OwnLMHeadModel(transformers.GPT2LMHeadModel):
        pass

    message = refused(OwnLMHeadModel(transformers.GPT2Config(**GPT2_SIZES)))
    assert "the code of another class would not be run" in message and "OwnLMHeadModel" in message


@pytest.mark.parametrize(
    ("kind", "head", "config", "text"),
    [
        ("gpt2", None, {"embd_pdrop": 0.1}, "config.embd_pdrop must be resid_pdrop, 0.0"),
        ("bert", "classification", {"problem_type": "multi_label_classification"}, "config.problem_type must be"),
        ("bert", "classification", {"num_labels": 1}, "config.num_labels must be at least 2"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(kind, head, config, text):
    assert text in refused(toy_model(kind, head, **config))


def test_dropout_at_other_places_has_a_line():
    plugin, model = MegatronLMPlugin(), toy_model("t5", dropout_rate=0.1)
    config = run_config(plugin, weights_of(model).config, num_processes=1, micro_batch_size=1)
    assert "with hidden_dropout=0.1 transformers also drops inside MLPs" in parsers.model_notices(model, config)[0]
    assert parsers.model_notices(model, config.replace(hidden_dropout=0.0)) == []
    assert parsers.model_notices(toy_model("gpt2"), config) == []


@pytest.mark.parametrize("kind", ["gpt2", "megatron-bert", "t5", "llama"])
def test_network_sizes_are_in_the_default_args(kind):
    plugin, model = MegatronLMPlugin(), toy_model(kind)
    config = run_config(plugin, weights_of(model).config, num_processes=1, micro_batch_size=2, seq_length=16)
    parsers.set_network_size_args(plugin, model, config)
    args = plugin.megatron_lm_default_args
    name = {"gpt2": "gpt", "llama": "gpt", "t5": "t5"}.get(kind, "bert")
    expected = {
        "model_type_name": name, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "orig_vocab_size": 96,
        "padded_vocab_size": 128, "seq_length": 16, "encoder_seq_length": 16, "decoder_seq_length": 16,
        "pretraining_flag": True, "model_return_dict": True, "micro_batch_size": 2, "global_batch_size": 2,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert args["eos_token_id"] == model.config.eos_token_id


def test_accelerates_own_parsers_are_not_run():
    assert [parsers.user_parser(name) for name in ("gpt2", "megatron-bert", "llama", "mt5")] == [None] * 4
    plugin = MegatronLMPlugin()
    parsers.run_parser(plugin, toy_model("gpt2"))
    assert plugin.parsed_args == {}


def test_a_scripts_parser_acts_as_other_megatron_args():
    @parsers.add_model_config_to_megatron_parser("gpt2")
    def parse(megatron_lm_plugin, model, batch_data):
        length = batch_data["input_ids"].shape[1]
        megatron_lm_plugin.megatron_lm_default_args |= {
            "model_type_name": "gpt", "tokenizer_type": "GPT2BPETokenizer", "num_layers": model.config.n_layer,
            "num_labels": 2, "orig_vocab_size": 96, "seq_length": length, "hidden_dropout": 0.25,
        }  # fmt: skip

    plugin, model = MegatronLMPlugin(), toy_model("gpt2")
    parsers.check_model(model)
    parsers.run_parser(plugin, model, {"input_ids": torch.zeros(2, 24, dtype=torch.long)})
    config = run_config(plugin, weights_of(model).config, num_processes=1, micro_batch_size=2)
    assert (config.model.hidden_dropout, config.data.seq_length, config.data.tokenizer_type) == (0.25, 24, None)


class Own(nn.Module):
    """A model that megalith has no table for."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(model_type="my-model", depth=3)
        self.layer = nn.Linear(2, 2)


def test_a_model_that_only_a_parser_describes_starts_at_random():
    @parsers.add_model_config_to_megatron_parser("my-model")
    def parse(megatron_lm_plugin, model, batch_data):
        megatron_lm_plugin.megatron_lm_default_args |= {
            "model_type_name": "gpt", "num_layers": model.config.depth, "hidden_size": 32, "num_attention_heads": 4,
            "max_position_embeddings": 64, "orig_vocab_size": 96, "swiglu": True,
        }  # fmt: skip

    model, plugin = Own(), MegatronLMPlugin(keep_weights=False, tp_degree=2)
    parsers.check_model(model)
    parsers.run_parser(plugin, model)
    weights_config = parsers.parsed_config(plugin, model)
    config = run_config(plugin, weights_config, num_processes=2, micro_batch_size=1)
    assert (config.model.num_layers, config.model.activation, config.model.vocab_size) == (3, "swiglu", 96)
    assert parsers.kind_of(model, config) == "gpt"
    parsers.set_network_size_args(plugin, model, config)
    with pytest.raises(ConfigError, match="keep_weights must be False"):
        parsers.parsed_config(MegatronLMPlugin(), model)


def test_a_parser_must_say_which_model_it_is():
    @parsers.add_model_config_to_megatron_parser("my-model")
    def parse(megatron_lm_plugin, model, batch_data):
        megatron_lm_plugin.megatron_lm_default_args["num_layers"] = 3

    plugin = MegatronLMPlugin(keep_weights=False)
    parsers.run_parser(plugin, Own())
    with pytest.raises(ConfigError, match="model_type_name must be one of gpt, bert, t5"):
        parsers.parsed_config(plugin, Own())
