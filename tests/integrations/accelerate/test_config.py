"""From a plugin and the config of a transformers model to a RunConfig: what acts, what is refused, what logs say."""

import types

import pytest

from megalith.checkpoint.formats.huggingface.family import FAMILIES
from megalith.common.errors import ConfigError
from megalith.config.architectures import architecture
from megalith.config.run import RunConfig
from megalith.config.stages import layers_of
from megalith.integrations.accelerate.config import config_notices, megatron_log_lines, parallel_config, run_config
from megalith.integrations.accelerate.plugin import MegatronLMPlugin

GPT2 = {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 96}
BERT = {
    "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96,
}  # fmt: skip
T5 = {"num_layers": 4, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 96}
LLAMA = {
    **BERT, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
TOYS = {"gpt2": GPT2, "bert": BERT, "megatron-bert": BERT, "t5": T5, "mt5": T5, "llama": LLAMA, "mistral": LLAMA}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.setattr("megalith.common.environment.megatron_lm_options", dict)


def weights_config(model_type="gpt2", **given):
    """The config of a transformers model, as `weights_of` gives it."""
    values = FAMILIES.find(model_type).config_from_hf(TOYS[model_type] | given)
    values["seq_length"] = values.get("max_position_embeddings")
    return RunConfig().replace(**{**architecture(values["model_type"]).defaults, **values})


def made(plugin=None, weights=None, **given):
    """A run_config with usual arguments."""
    plugin = plugin or MegatronLMPlugin()
    size = plugin.tp_degree * plugin.pp_degree * plugin.context_parallel_size
    usual = {"num_processes": size, "micro_batch_size": 2, "mixed_precision": "no", "device": "cpu"}
    return run_config(plugin, weights or weights_config(), **{**usual, **given})


def errors(*args, **given):
    with pytest.raises(ConfigError) as caught:
        made(*args, **given)
    return str(caught.value)


def test_the_guides_log_of_gpt2_large():
    sizes = {"n_layer": 36, "n_embd": 1280, "n_head": 20, "n_positions": 1024, "vocab_size": 50257}
    plugin = MegatronLMPlugin(tp_degree=2, pp_degree=2, num_micro_batches=2, sequence_parallelism=True)
    weights = weights_config(**sizes)
    config = made(plugin, weights, micro_batch_size=24, seq_length=1024, mixed_precision="bf16")
    number = " > number of parameters on (tensor, pipeline) model parallel rank"
    assert megatron_log_lines(config, keeps_weights=False) == [
        " > padded vocab (size: 50257) with 175 dummy tokens (new size: 50432)",
        "Building gpt model in the pre-training mode.",
        "The Megatron LM model weights are initialized at random in `accelerator.prepare`. Please use "
        "`accelerator.load_checkpoint` to load a pre-trained checkpoint.",
        f"{number} (0, 0): 210753280",
        f"{number} (1, 0): 210753280",
        f"{number} (0, 1): 209445120",
        f"{number} (1, 1): 209445120",
    ]
    assert len(megatron_log_lines(config)) == 6  # weights that are kept are not announced as random
    assert (config.batch.global_batch_size, config.batch.micro_batch_size) == (48, 24)
    assert [len(layers) for layers in layers_of(config)] == [18, 18]
    assert config.precision.bf16 and config.parallel.sequence_parallel and config.data.seq_length == 1024


@pytest.mark.parametrize("model_type", TOYS)
def test_every_kind_of_model_in_a_layout(model_type):
    weights = weights_config(model_type)
    config = made(MegatronLMPlugin(tp_degree=2, pp_degree=2, num_micro_batches=2), weights, num_processes=8)
    assert config.model == weights.model
    assert config.data.dataset == weights.data.dataset and config.data.loss == weights.data.loss
    assert config.batch.global_batch_size == 2 * 2 * 2
    mode = f"Building {config.model.architecture.name} model in the pre-training mode."
    assert megatron_log_lines(config)[1] == mode


def test_a_classifier_is_built_in_fine_tuning_mode():
    weights = weights_config("bert", architectures=["BertForSequenceClassification"], id2label={0: "a", 1: "b", 2: "c"})
    config = made(weights=weights)
    assert config.model.num_classes == 3 and config.data.loss == "classification"
    assert megatron_log_lines(config)[1] == "Building bert model in the fine-tuning mode."


def test_the_layout_is_known_before_the_model():
    plugin = MegatronLMPlugin(
        tp_degree=2, pp_degree=2, use_custom_fsdp=True, other_megatron_args={"pipeline_schedule": "gpipe"}
    )
    device = types.SimpleNamespace(type="cpu")  # as a torch.device
    parallel = parallel_config(plugin, device)
    assert parallel == made(plugin, device=device).parallel
    assert (parallel.sharding, parallel.pipeline_schedule, parallel.device) == ("full", "gpipe", "cpu")
    assert parallel.pipeline_split == "even"
    assert parallel_config(MegatronLMPlugin(other_megatron_args={"pipeline_split": "cost"})).pipeline_split == "cost"


def test_precision():
    assert made(mixed_precision="fp16").precision.initial_loss_scale == 2.0**16
    other = MegatronLMPlugin(other_megatron_args={"initial_loss_scale": 1024, "fp16": True})
    assert made(other, mixed_precision="fp16").precision.initial_loss_scale == 1024
    assert made().precision.compute_dtype == "float32"
    assert made(mixed_precision=None).precision.compute_dtype == "float32"
    assert "mixed_precision must be no, fp16 or bf16; found 'fp8'" in errors(mixed_precision="fp8")
    assert "other_megatron_args: fp16 must be as mixed_precision of the Accelerator, bf16" in errors(
        MegatronLMPlugin(other_megatron_args={"fp16": True}), mixed_precision="bf16"
    )


def test_a_model_in_bfloat16_computes_in_it():
    weights = weights_config().replace(bf16=True)
    plugin = MegatronLMPlugin()
    config = made(plugin, weights)
    assert config.precision.bf16
    assert config_notices(plugin, config, weights) == [
        "the model is in bfloat16: it computes in that, and its weights are trained in float32"
    ]
    assert not made(plugin, weights, mixed_precision="fp16").precision.bf16


def test_dropout_is_the_models_unless_the_plugin_says_otherwise():
    weights = weights_config(resid_pdrop=0.25, attn_pdrop=0.5)
    assert (made(weights=weights).model.hidden_dropout, made(weights=weights).model.attention_dropout) == (0.25, 0.5)
    plugin = MegatronLMPlugin(hidden_dropout=0.0)
    config = made(plugin, weights)
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.0, 0.5)
    assert config_notices(plugin, config, weights) == ["hidden_dropout is 0, was 0.25"]


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (
            {"position_embedding_type": "alibi"},
            ["position_embedding_type must be learned_absolute", "otherwise position_embedding.weight would be lost"],
        ),
        (
            {"attention_head_type": "multiquery"},
            ["attention_head_type must be multihead", "layers.*.attention.k.weight", "would have other shapes"],
        ),
        ({"num_layers": 6}, ["num_layers must be 4", "layers.*.attention_norm.weight", "would have to be invented"]),
        ({"swiglu": True}, ["swiglu must be False", "layers.*.mlp.gate.weight"]),
        ({"vocab_size": 128}, ["vocab_size must be 96", "embedding.weight would have other shapes"]),
        ({"layernorm_epsilon": 1e-3}, ["layernorm_epsilon must be 1e-05", "which were trained with it"]),
    ],
)
def test_another_architecture_needs_the_random_start(args, texts):
    message = errors(MegatronLMPlugin(other_megatron_args=args))
    assert "other_megatron_args: " in message and "MegatronLMPlugin(keep_weights=False)" in message
    assert not [text for text in texts if text not in message], message
    config = made(MegatronLMPlugin(other_megatron_args=args, keep_weights=False))
    assert config.flat().items() >= args.items()
    assert made(MegatronLMPlugin(other_megatron_args=args), keeps_weights=False) == config


def test_rotary_positions_by_the_plugins_option():
    message = errors(MegatronLMPlugin(use_rotary_position_embeddings=True))
    assert message.startswith("use_rotary_position_embeddings must be False") and "position_embedding.weight" in message
    rotary = MegatronLMPlugin(use_rotary_position_embeddings=True)
    assert made(rotary, weights_config("llama")).model.positions == "rope"
    assert made(rotary, keeps_weights=False).model.positions == "rope"
    off = MegatronLMPlugin(use_rotary_position_embeddings=False)
    config = made(off, weights_config("llama"))
    assert config.model.positions == "rope"
    assert config_notices(off, config, weights_config("llama")) == [
        "use_rotary_position_embeddings=False has no effect: the model has rotary positions"
    ]


def test_initial_values_have_a_line_where_weights_are_kept():
    plugin = MegatronLMPlugin(other_megatron_args={"init_method_std": 0.01})
    assert "init_method_std has no effect" in config_notices(plugin, made(plugin), weights_config())[0]
    assert "init_method_std is" not in str(config_notices(plugin, made(plugin), weights_config(), keeps_weights=False))


@pytest.mark.parametrize(
    ("plugin", "given", "text"),
    [
        ({"tp_degree": 2, "pp_degree": 2}, {"num_processes": 6}, "must be a multiple of tensor 2 x pipeline 2"),
        ({"tp_degree": 3}, {}, "tp_degree must divide num_attention_heads, 4; found 3. Write tp_degree"),
        ({"pp_degree": 5}, {}, "pp_degree must be at most num_layers, 4"),
        ({"pp_degree": 2, "num_layers_per_virtual_pipeline_stage": 3}, {}, "num_layers_per_virtual_pipeline_stage"),
        ({}, {"seq_length": 65}, "seq_length must be at most max_position_embeddings, 64"),
        ({"tp_degree": 2, "sequence_parallelism": True}, {"seq_length": 63}, "seq_length must be a multiple of 2"),
        ({"recompute_granularity": "full", "recompute_num_layers": 5}, {}, "recompute_num_layers must be at most"),
        ({}, {"device": "tpu"}, "device must be one of auto, cpu, cuda, xpu"),
        ({"other_megatron_args": {"vocab_file": "vocab.json"}}, {}, "merge_file must be given"),
    ],
)
def test_what_does_not_fit_the_model_or_the_processes(plugin, given, text):
    message = errors(MegatronLMPlugin(**plugin), **given)
    assert text in message
    assert "--" not in message, message


def test_a_plugin_that_was_changed_is_checked_again():
    plugin = MegatronLMPlugin()
    plugin.gradient_clipping = -1.0
    assert "gradient_clipping must be at least 0" in errors(plugin)


def test_fewer_micro_batches_than_stages_work():
    assert made(MegatronLMPlugin(pp_degree=4)).batch.global_batch_size == 2


def test_lengths():
    assert made().data.seq_length == 64
    assert made(MegatronLMPlugin(seq_length=32)).data.seq_length == 32
    assert made(MegatronLMPlugin(encoder_seq_length=32)).data.seq_length == 32
    assert made(MegatronLMPlugin(seq_length=32), seq_length=16).data.seq_length == 16
    t5 = made(MegatronLMPlugin(seq_length=1024, decoder_seq_length=128), weights_config("t5"))
    assert (t5.data.seq_length, t5.data.decoder_seq_length, t5.model.max_position_embeddings) == (1024, 128, 1024)
    assert made(MegatronLMPlugin(decoder_seq_length=16)).data.decoder_seq_length is None


def test_tokenizers():
    files = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
    data = made(MegatronLMPlugin(other_megatron_args=files)).data
    assert (data.tokenizer_type, data.vocab_file, data.merge_file) == ("GPT2BPETokenizer", "vocab.json", "merges.txt")
    bert = MegatronLMPlugin(other_megatron_args={"vocab_file": "vocab.txt"})
    assert made(bert, weights_config("bert")).data.tokenizer_type == "BertWordPieceLowerCase"


def test_recomputation():
    assert made().recompute.granularity is None
    assert made(MegatronLMPlugin(recompute_activations=True)).recompute.granularity == "selective"
    full = made(MegatronLMPlugin(recompute_granularity="full", recompute_num_layers=2)).recompute
    assert (full.granularity, full.recompute_method, full.recompute_num_layers) == ("full", "uniform", 2)
    plugin = MegatronLMPlugin()
    config = made(plugin, recomputes=True)  # the model's own gradient checkpointing
    assert (config.recompute.granularity, config.recompute.recompute_method) == ("full", "uniform")
    assert "gradient checkpointing" in config_notices(plugin, config, weights_config(), recomputes=True)[0]
    assert made(MegatronLMPlugin(recompute_activations=True), recomputes=True).recompute.granularity == "selective"


def test_what_trains_besides():
    plugin = MegatronLMPlugin(
        gradient_clipping=0.5, use_distributed_optimizer=True, train_iters=10, lr_warmup_iters=2,
        other_megatron_args={"seed": 7, "compile": False, "make_vocab_size_divisible_by": 64, "z_loss_coeff": 1e-4},
    )  # fmt: skip
    config = made(plugin)
    assert config.optimizer.clip_grad == 0.5 and config.parallel.sharding == "optimizer"
    assert (config.schedule.train_iters, config.schedule.lr_warmup_iters, config.batch.seed) == (10, 2, 7)
    assert config.model.make_vocab_size_divisible_by == 64 and config.model.z_loss_coeff == 1e-4
    assert "model_type has no effect" in MegatronLMPlugin(other_megatron_args={"model_type": "bert"}).notices()[0]
