"""MegatronLMPlugin: every option acts, has a line that says why it does not, or is an error; where it comes from."""

import copy
import dataclasses

import accelerate.utils
import pytest

from megalith.common.errors import ConfigError
from megalith.config.flags.values import fields
from megalith.integrations.accelerate import plugin as plugins
from megalith.integrations.accelerate.options.checks import TYPES, kind_of, options
from megalith.integrations.accelerate.plugin import MegatronLMPlugin

OLD = [
    "tp_degree", "pp_degree", "num_micro_batches", "gradient_clipping", "sequence_parallelism",
    "recompute_activation", "use_distributed_optimizer", "pipeline_model_parallel_split_rank",
    "num_layers_per_virtual_pipeline_stage", "is_train_batch_min", "train_iters", "train_samples",
    "weight_decay_incr_style", "start_weight_decay", "end_weight_decay", "lr_decay_style", "lr_decay_iters",
    "lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "min_lr", "consumed_samples",
    "no_wd_decay_cond", "scale_lr_cond", "lr_mult", "megatron_dataset_flag", "seq_length", "encoder_seq_length",
    "decoder_seq_length", "tensorboard_dir", "set_all_logging_options", "eval_iters", "eval_interval",
    "return_logits", "custom_train_step_class", "custom_train_step_kwargs", "custom_model_provider_function",
    "custom_prepare_model_function", "other_megatron_args",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in plugins.environment.os.environ if name.startswith("MEGATRON_LM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def variables(monkeypatch):
    """Set variables of Accelerate's launcher: variables(TP_DEGREE="2")."""

    def set_all(**texts):
        for name, text in texts.items():
            monkeypatch.setenv(f"MEGATRON_LM_{name}", text)

    return set_all


def errors(**given):
    """The problems of a plugin with these options, a text."""
    with pytest.raises(ConfigError) as caught:
        MegatronLMPlugin(**given)
    return str(caught.value)


def test_every_field_of_accelerates_plugins_is_there():
    new = [each.name for each in dataclasses.fields(accelerate.utils.MegatronLMPlugin)]
    plugin = MegatronLMPlugin()
    assert not [name for name in [*new, *OLD, "require_logits"] if not hasattr(plugin, name)]
    assert {*new, *OLD, "require_logits"} <= set(MegatronLMPlugin.__init__.__annotations__)


def test_defaults_are_the_guides():
    plugin = MegatronLMPlugin()
    expected = {
        "tp_degree": 1, "pp_degree": 1, "context_parallel_size": 1, "num_micro_batches": 1, "gradient_clipping": 1.0,
        "sequence_parallelism": False, "recompute_activations": False, "recompute_granularity": None,
        "use_distributed_optimizer": False, "hidden_dropout": None, "attention_dropout": None, "eval_iters": 100,
        "eval_interval": 1000, "lr_decay_style": "linear", "min_lr": 0.0, "lr_mult": 1.0, "return_logits": False,
        "is_train_batch_min": True, "use_rotary_position_embeddings": None, "keep_weights": True,
    }  # fmt: skip
    assert {name: getattr(plugin, name) for name in expected} == expected
    assert plugin.notices() == []


def test_every_option_has_a_type_that_is_checked_and_a_field_that_exists():
    for name, field in options(MegatronLMPlugin()).items():
        run = field.metadata["run"]
        assert run in fields() if run else kind_of(field) in TYPES, name
        assert run or field.metadata["no_effect"] or _is_read(name), name


def _is_read(name):
    """Options that other modules read from the plugin itself."""
    return name.startswith(("custom_", "expert_")) or name in (
        "num_micro_batches", "use_custom_fsdp", "is_train_batch_min", "no_wd_decay_cond", "scale_lr_cond", "lr_mult",
        "megatron_dataset_flag", "consumed_samples", "return_logits", "other_megatron_args", "keep_weights",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "run", "value"),
    [
        ({"tp_degree": 2}, "tensor_model_parallel_size", 2),
        ({"pp_degree": 4}, "pipeline_model_parallel_size", 4),
        ({"context_parallel_size": 2}, "context_parallel_size", 2),
        ({"gradient_clipping": 0.5}, "clip_grad", 0.5),
        ({"gradient_clipping": 0}, "clip_grad", 0),
        ({"tp_degree": 2, "sequence_parallelism": True}, "sequence_parallel", True),
        ({"recompute_activation": True}, "recompute_activations", True),
        ({"recompute_granularity": "full"}, "recompute_method", "uniform"),
        ({"use_distributed_optimizer": True}, "use_distributed_optimizer", True),
        ({"use_custom_fsdp": True}, "data_parallel_sharding", "full"),
        ({"attention_backend": True}, "attention_backend", "auto"),
        ({"attention_backend": False}, "attention_backend", "unfused"),
        ({"attention_backend": "flash"}, "attention_backend", "flash"),
        ({"hidden_dropout": 0.2}, "hidden_dropout", 0.2),
        ({"encoder_seq_length": 32}, "seq_length", 32),
        ({"other_megatron_args": {"pipeline_split": "cost"}}, "pipeline_split", "cost"),
    ],
)
def test_options_set_fields_of_the_config(given, run, value):
    assert MegatronLMPlugin(**given).run_fields()[run] == value


def test_old_spellings_are_the_new_options():
    plugin = MegatronLMPlugin(recompute_activation=True, require_logits=True)
    assert plugin.recompute_activations and plugin.return_logits
    plugin.require_logits = False
    assert plugin.return_logits is False
    plugin.recompute_activations = False
    assert plugin.recompute_activation is False
    assert "recompute_activation is another spelling of recompute_activations, True" in errors(
        recompute_activation=False, recompute_activations=True
    )
    assert "require_logits is another spelling" in errors(return_logits=True, require_logits=False)


def test_options_are_read_from_the_environment_and_code_goes_first(variables):
    variables(
        TP_DEGREE="2", PP_DEGREE="2", NUM_MICRO_BATCHES="4", GRADIENT_CLIPPING="0.5", SEQUENCE_PARALLELISM="True",
        RECOMPUTE_ACTIVATIONS="true", USE_DISTRIBUTED_OPTIMIZER="yes", USE_CUSTOM_FSDP="False", HIDDEN_DROPOUT="0.3",
    )  # fmt: skip
    plugin = MegatronLMPlugin(pp_degree=1, use_distributed_optimizer=False)
    assert (plugin.tp_degree, plugin.pp_degree, plugin.num_micro_batches, plugin.gradient_clipping) == (2, 1, 4, 0.5)
    assert plugin.sequence_parallelism and plugin.recompute_activations and not plugin.use_distributed_optimizer
    assert plugin.hidden_dropout == 0.3
    assert plugin.notices() == []


def test_the_old_variable_of_recomputation_is_read_too(variables):
    variables(RECOMPUTE_ACTIVATION="1")
    assert MegatronLMPlugin().recompute_activations
    variables(RECOMPUTE_ACTIVATIONS="off")
    assert "RECOMPUTE_ACTIVATION" in errors() and "another spelling of a variable" in errors()


def test_what_launchers_set_for_any_layout_gives_way(variables):
    variables(SEQUENCE_PARALLELISM="True", RECOMPUTE_ACTIVATIONS="True", RECOMPUTE_METHOD="None", TP_DEGREE="")
    plugin = MegatronLMPlugin(recompute_granularity="full")
    assert (plugin.tp_degree, plugin.sequence_parallelism, plugin.recompute_activations) == (1, False, False)
    assert plugin.notices() == []


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("TP_DEGREE", "two", "must be a whole number"),
        ("GRADIENT_CLIPPING", "much", "must be a number"),
        ("SEQUENCE_PARALLELISM", "maybe", "must be true or false"),
    ],
)
def test_wrong_text_of_a_variable_is_an_error(variables, name, text, rule):
    variables(**{name: text})
    assert f"The environment variable MEGATRON_LM_{name} {rule}" in errors() and repr(text) in errors()


def test_a_wrong_value_names_the_variable_that_it_came_from(variables):
    variables(TP_DEGREE="0")
    assert "tp_degree must be at least 1; found 0" in errors()
    assert "(tp_degree is from the environment variable MEGATRON_LM_TP_DEGREE.)" in errors()


def test_a_mistyped_variable_has_a_line(variables):
    variables(TP_DEGRE="2")
    (line,) = MegatronLMPlugin().notices()
    assert "MEGATRON_LM_TP_DEGRE is read by nothing; did you mean MEGATRON_LM_TP_DEGREE?" in line


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"tp_degree": 0}, "tp_degree must be at least 1; found 0. Write tp_degree 1 or more"),
        ({"tp_degree": "2"}, "tp_degree must be a whole number"),
        ({"pp_degree": True}, "pp_degree must be a whole number"),
        ({"num_micro_batches": 0}, "num_micro_batches must be at least 1"),
        ({"num_micro_batches": 1.5}, "num_micro_batches must be a whole number"),
        ({"gradient_clipping": -1.0}, "gradient_clipping must be at least 0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping must be a finite number"),
        ({"sequence_parallelism": "yes"}, "sequence_parallelism must be true or false"),
        ({"recompute_granularity": "selectiv"}, "recompute_granularity must be one of selective, full"),
        ({"recompute_method": "uniform"}, "recompute_method is for recompute_granularity full alone"),
        ({"recompute_activations": True, "recompute_granularity": "full"}, "recompute_activations means"),
        ({"num_layers_per_virtual_pipeline_stage": 2}, "num_layers_per_virtual_pipeline_stage needs a pipeline"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size must be 1; found 2"),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size must be 1"),
        ({"attention_backend": "flsh"}, "attention_backend must be one of auto"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must be a fraction below 1"),
        ({"consumed_samples": [1, 2, 3, 4]}, "consumed_samples must be a list of up to three"),
        ({"consumed_samples": 5}, "consumed_samples must be a list"),
        ({"is_train_batch_min": "True"}, "is_train_batch_min must be True or False"),
        ({"custom_train_step_class": "GPTTrainStep"}, "custom_train_step_class must be a class"),
        ({"custom_train_step_kwargs": 3}, "custom_train_step_kwargs must be a dict"),
        ({"custom_model_provider_function": 3}, "custom_model_provider_function must be a function"),
        ({"other_megatron_args": "alibi"}, "other_megatron_args must be a dict"),
        ({"lr_mult": -1.0}, "lr_mult must be at least 0"),
        ({"lr_decay_style": "cosin"}, "lr_decay_style must be one of constant"),
        ({"train_iters": 10, "train_samples": 10}, "train_iters excludes train_samples"),
        ({"train_iters": 10, "lr_warmup_samples": 4}, "lr_warmup_samples cannot go with train_iters"),
        ({"train_iters": 10, "lr_warmup_iters": 10}, "lr_warmup_iters must be less than train_iters, 10"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 10}, "lr_warmup_fraction"),
        ({"weight_decay_incr_style": "linear"}, "start_weight_decay"),
        ({"seq_length": 8, "encoder_seq_length": 9}, "encoder_seq_length is another spelling of seq_length, 8"),
        ({"seq_length": 9, "tp_degree": 2, "sequence_parallelism": True}, "seq_length must be a multiple of 2"),
        ({"pp_degree": 4, "num_layers_per_virtual_pipeline_stage": 1, "num_micro_batches": 9}, "micro-batches"),
        (
            {"pp_degree": 2, "other_megatron_args": {"pipeline_schedule": "1f1b"}},
            "Write num_micro_batches 2, or pipeline_schedule gpipe",
        ),
    ],
)
def test_wrong_values_and_combinations_are_errors(given, text):
    message = errors(**given)
    assert text in message
    assert "--" not in message.replace("--help", "").replace("--skip-train", ""), message


@pytest.mark.parametrize("name", options(MegatronLMPlugin()))
def test_no_value_makes_the_checks_themselves_fail(name):
    for value in (None, True, -1, 7, float("inf"), "x", ["x"], {"x": object()}, len, int):
        try:
            plugin = MegatronLMPlugin(**{name: value})
        except ConfigError as error:
            assert name in str(error) or "weight_decay" in name
        else:
            assert all(isinstance(line, str) for line in plugin.notices())
        plugin = MegatronLMPlugin()
        setattr(plugin, name, value)
        assert all(isinstance(text, str) for text in plugin.problems())


def test_all_mistakes_are_reported_at_once():
    message = errors(tp_degree=0, num_micro_batches=-1, gradient_clipping=-2.0, other_megatron_args={"swiglue": True})
    assert message.startswith("4 problems")
    assert all(word in message for word in ("tp_degree", "num_micro_batches", "gradient_clipping", "swiglue"))


def test_a_mistyped_attribute_is_an_error_and_others_are_free():
    plugin = MegatronLMPlugin()
    with pytest.raises(ConfigError, match="did you mean custom_train_step_class"):
        plugin.custom_train_step_clas = object
    plugin.custom_train_step_kwargs = {"alpha": 0.25}
    plugin.mesh = "anything of others"


def test_a_mistyped_name_is_an_error():
    with pytest.raises(ConfigError, match=r"^MegatronLMPlugin has no such option; found 'tp_degre'\. Write tp_degree"):
        MegatronLMPlugin(tp_degre=2)  # type: ignore[call-arg]


def test_what_is_changed_later_is_checked_again():
    plugin = MegatronLMPlugin()
    plugin.tp_degree, plugin.num_micro_batches = -1, None
    assert len(plugin.problems()) == 2


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"pipeline_model_parallel_split_rank": 1}, "pipeline_model_parallel_split_rank=1 has no effect"),
        ({"decoder_last_pipeline_num_layers": 1}, "decoder_last_pipeline_num_layers=1 has no effect"),
        ({"attention_softmax_in_fp32": False}, "attention_softmax_in_fp32=False has no effect"),
        ({"calculate_per_token_loss": False}, "calculate_per_token_loss=False has no effect"),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload=True has no effect"),
        ({"overlap_cpu_optimizer_d2h_h2d": True}, "overlap_cpu_optimizer_d2h_h2d=True has no effect"),
        ({"use_precision_aware_optimizer": True}, "use_precision_aware_optimizer=True has no effect"),
        ({"tensorboard_dir": "logs"}, "log_with='tensorboard'"),
        ({"set_all_logging_options": True}, "set_all_logging_options=True has no effect"),
        ({"sequence_parallelism": True}, "sequence_parallelism=True has no effect: tp_degree is 1"),
        ({"other_megatron_args": {"sequence_parallel": True}}, "sequence_parallelism=True has no effect"),
        ({"pp_degree": 2}, "num_micro_batches is 1, less than the 2 pipeline stages"),
        ({"lr_mult": 2.0}, "lr_mult has no effect"),
        ({"custom_train_step_kwargs": {"alpha": 1}}, "custom_train_step_kwargs has no effect"),
        ({"recompute_num_layers": 2}, "recompute_num_layers has no effect"),
        ({"eval_iters": 10}, "eval_iters has no effect: it is for indexed datasets"),
        ({"eod_mask_loss": True}, "eod_mask_loss has no effect"),
        ({"consumed_samples": [4]}, "consumed_samples has no effect"),
        ({"other_megatron_args": {"use_flash_attn": True}}, "other_megatron_args: use_flash_attn is not needed"),
        ({"other_megatron_args": {"log_throughput": True}}, "log_throughput is not needed: Accelerator(log_with"),
        ({"other_megatron_args": {"lr": 1e-3}}, "other_megatron_args: lr has no effect: the optimizer given"),
        ({"other_megatron_args": {"micro_batch_size": 2}}, "micro_batch_size has no effect: data loaders"),
        ({"other_megatron_args": {"wandb_project": "mine"}}, "wandb_project has no effect: Accelerator(log_with"),
        ({"other_megatron_args": {"save": "there"}}, "save has no effect: accelerator.save_state("),
        ({"other_megatron_args": {"reset_position_ids": True}}, "reset_position_ids has no effect: only indexed"),
    ],
)
def test_what_does_nothing_says_so_in_a_line(given, text):
    notices = MegatronLMPlugin(**given).notices()
    assert len(notices) == 1 and text in notices[0], notices


def test_harmless_values_say_nothing(variables):
    variables(USE_CUSTOM_FSDP="False", NO_LOAD_OPTIM="False", EOD_MASK_LOSS="False", OPTIMIZER_CPU_OFFLOAD="False")
    given = {"attention_softmax_in_fp32": True, "calculate_per_token_loss": True, "expert_model_parallel_size": 1}
    assert MegatronLMPlugin(**given).notices() == []
    indexed = MegatronLMPlugin(megatron_dataset_flag=True, eval_iters=10, other_megatron_args={"split": "98,2,0"})
    assert indexed.notices() == [] and indexed.run_fields()["split"] == "98,2,0"


def test_other_megatron_args_are_further_spellings_of_options():
    plugin = MegatronLMPlugin(other_megatron_args={"tensor_model_parallel_size": 2, "lr_decay_style": "cosine"})
    assert (plugin.tp_degree, plugin.lr_decay_style) == (2, "cosine")
    message = errors(tp_degree=4, other_megatron_args={"tensor_model_parallel_size": 2})
    assert "other_megatron_args: tensor_model_parallel_size must be tp_degree, 4, because it is the same" in message


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"position_embeding_type": "alibi"}, "unknown name position_embeding_type: did you mean position_embedding_t"),
        ({"position_embedding_type": "alibbi"}, "position_embedding_type must be one of"),
        ({"num_experts": 8}, "num_experts 8 cannot be used: there are no mixture-of-experts layers"),
        ({"num_layers": "many"}, "num_layers must be a whole number"),
        ({"swiglu": 2}, "swiglu must be on or off"),
        ({"train_tokens": 100}, "train_tokens must be given in samples here"),
        ({"merge_file": "merges.txt"}, "vocab_file must be given, because GPT2BPETokenizer is made from it"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"}, "merge_file must be given"),
        ({"use_rotary_position_embeddings": True, "position_embedding_type": "alibi"}, "excludes"),
    ],
)
def test_wrong_arguments_are_errors(args, text):
    message = errors(other_megatron_args=args)
    assert "other_megatron_args: " in message or "excludes" in message
    assert text in message


def test_arguments_that_are_off_or_unset_in_megatrons_way_do_nothing():
    args = {
        "masked_softmax_fusion": False, "gradient_accumulation_fusion": True, "use_flash_attn": False,
        "fp8_format": None, "num_query_groups": None, "moe_grouped_gemm": False, "log_throughput": False,
    }  # fmt: skip
    plugin = MegatronLMPlugin(other_megatron_args=args)
    (line,) = plugin.notices()
    assert "no_masked_softmax_fusion is not needed" in line
    assert plugin.args().active == {"num_query_groups": None}


def test_guide_examples_are_taken():
    plugin = MegatronLMPlugin(other_megatron_args={"vocab_file": "vocab.json", "merge_file": "merges.txt"})
    assert plugin.run_fields()["vocab_file"] == "vocab.json"
    assert MegatronLMPlugin(return_logits=True).return_logits
    for args in ({"position_embedding_type": "alibi"}, {"attention_head_type": "multiquery"}):
        assert MegatronLMPlugin(other_megatron_args=args).run_fields().items() >= args.items()


def test_schedule_fields_are_those_of_the_scheduler():
    plugin = MegatronLMPlugin(
        train_iters=100, lr_warmup_iters=10, lr_decay_style="WSD",
        other_megatron_args={"lr_wsd_decay_iters": 20, "lr_warmup_init": 1e-7, "min_lr": 1e-5},
    )  # fmt: skip
    assert plugin.schedule_fields() == {
        "train_iters": 100, "lr_warmup_iters": 10, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 20,
        "lr_warmup_init": 1e-7, "min_lr": 1e-5, "weight_decay_incr_style": "constant",
    }  # fmt: skip


def test_batch_sizes_are_known_after_prepare():
    plugin = MegatronLMPlugin(num_micro_batches=2)
    with pytest.raises(ConfigError, match=r"not known before accelerator\.prepare"):
        _ = plugin.global_batch_size
    plugin.set_training_args(24, 1)
    assert (plugin.global_batch_size, plugin.micro_batch_size, plugin.data_parallel_size) == (48, 24, 1)
    assert plugin.megatron_lm_default_args["global_batch_size"] == 48


def test_default_args_have_megatrons_names():
    args = MegatronLMPlugin(tp_degree=2, other_megatron_args={"swiglu": True}).megatron_lm_default_args
    assert args["tensor_model_parallel_size"] == 2 and args["clip_grad"] == 1.0 and args["swiglu"] is True
    assert args["num_micro_batches"] == 1


def test_consumed_samples_are_of_three_loaders():
    assert MegatronLMPlugin(consumed_samples=[8], megatron_dataset_flag=True).consumed_samples == [8, 0, 0]


def test_a_plugin_can_be_copied_and_changed():
    plugin = MegatronLMPlugin(tp_degree=2, recompute_activation=True)
    assert dataclasses.replace(plugin, tp_degree=4).tp_degree == 4
    assert copy.deepcopy(plugin) == plugin
    assert "tp_degree=2" in repr(plugin)
