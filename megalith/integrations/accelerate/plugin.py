"""MegatronLMPlugin: the options of Accelerate's Megatron-LM integration, old and new ones, on megalith's engine.

    plugin = MegatronLMPlugin(tp_degree=2, pp_degree=2, num_micro_batches=4)
    accelerator = Accelerator(megatron_lm_plugin=plugin)

An option that is None has the value of its environment variable (MEGATRON_LM_TP_DEGREE ...), which `megalith launch`
and `accelerate launch` set from a YAML file; else that of the guide, or what the model given to `prepare` has itself.
"""
# ruff: noqa: RUF009 - option() makes a new field in each call

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megalith.common import environment
from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import fail, nearest
from megalith.integrations.accelerate.options import checks, megatron_args
from megalith.integrations.accelerate.options.checks import kind_of, options
from megalith.integrations.accelerate.options.megatron_args import TRACKERS

OTHER_SPELLINGS = {  # Accelerate's of old, the guide's, and T5's -> the option
    "recompute_activation": "recompute_activations",
    "require_logits": "return_logits",
    "encoder_seq_length": "seq_length",
}
CUTS = "layers are divided evenly among pipeline stages, those of an encoder and a decoder together"
OWN_OPTIMIZER = "the optimizer is the script's, and so is its state, which use_distributed_optimizer shards"
TENSORBOARD = "Accelerator(log_with='tensorboard', project_dir=...) records what accelerator.log is given"
READERS: dict[str, tuple[Callable[[str], Any], str]] = {  # type of an option -> how a variable's text is read
    "int": (lambda text: int(text) if text.lstrip("+-").isdecimal() else None, "a whole number"),
    "float": (lambda text: checks.number(text), "a number"),
    "bool": (environment.truth, "true or false (or yes, no, on, off, 1, 0)"),
    "str": (str, "text"),
}
INDEXED = ("eod_mask_loss", "eval_iters", "eval_interval", "consumed_samples")  # read with indexed datasets alone


def option(
    help: str,
    default: Any = None,
    *,
    otherwise: Any = None,
    run: str | None = None,
    least: float | None = None,
    no_effect: str | None = None,
    harmless: tuple = (None,),
) -> Any:
    """A field of the plugin.

    otherwise: the value where neither the script nor the environment gives one. run: the field of RunConfig that it
    sets. least: its smallest value, where it sets none. no_effect: why it does nothing here; a line says so where
    its value is not among the harmless.
    """
    metadata = {
        "help": help, "otherwise": otherwise, "run": run, "least": least, "no_effect": no_effect, "harmless": harmless,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class MegatronLMPlugin:
    """Layout, precision of details and custom parts of a training under Accelerate. Raises ConfigError with every
    mistake at once.

    `prepare` sets data_parallel_size, micro_batch_size (samples), global_batch_size (samples of a call of the model on
    all processes) and completes megatron_lm_default_args, {argument of Megatron: value}.
    """

    tp_degree: int | None = option("processes that split each layer", otherwise=1, run="tensor_model_parallel_size")
    pp_degree: int | None = option("pipeline stages", otherwise=1, run="pipeline_model_parallel_size")
    _: dataclasses.KW_ONLY
    num_micro_batches: int | None = option(
        "micro-batches of a call; a prepared loader yields so many times its batch size", otherwise=1, least=1
    )
    gradient_clipping: float | None = option("largest norm of all gradients; 0: any", otherwise=1.0, run="clip_grad")
    sequence_parallelism: bool | None = option(
        "split norms and dropout along the sequence; needs tp_degree > 1", otherwise=False, run="sequence_parallel"
    )
    recompute_activations: bool | None = option(
        "recompute core attention in the backward pass", otherwise=False, run="recompute_activations"
    )
    recompute_granularity: str | None = option("selective, or full: whole layers", run="recompute_granularity")
    recompute_method: str | None = option("of full recompute: uniform or block", run="recompute_method")
    recompute_num_layers: int | None = option("layers of a group, or of a stage", run="recompute_num_layers")
    use_distributed_optimizer: bool | None = option(
        "shard gradients and optimizer state over data-parallel processes", otherwise=False,
        run="use_distributed_optimizer",
    )  # fmt: skip
    use_custom_fsdp: bool | None = option("shard parameters too (ZeRO-3)", otherwise=False)
    context_parallel_size: int | None = option(
        "processes that split each sequence", otherwise=1, run="context_parallel_size"
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        "layers of a chunk of the interleaved schedule", run="num_layers_per_virtual_pipeline_stage"
    )
    pipeline_model_parallel_split_rank: int | None = option("first stage of a decoder", no_effect=CUTS)
    decoder_last_pipeline_num_layers: int | None = option("layers of the last stage", least=1, no_effect=CUTS)
    expert_model_parallel_size: int | None = option("processes that split experts", otherwise=1, least=1)
    expert_tensor_parallel_size: int | None = option("processes that split each expert", otherwise=1, least=1)
    attention_backend: str | bool | None = option("kernel: True, False (unfused) or its name", run="attention_backend")
    attention_softmax_in_fp32: bool | None = option(
        "softmax in float32", no_effect="it always is in float32", harmless=(None, True)
    )
    attention_dropout: float | None = option("None: the model's own", run="attention_dropout")
    hidden_dropout: float | None = option("None: the model's own", run="hidden_dropout")
    use_rotary_position_embeddings: bool | None = option(
        "rotary positions; in a model without them it needs keep_weights=False", run="use_rotary_position_embeddings"
    )
    calculate_per_token_loss: bool | None = option(
        "mean over tokens instead of over micro-batches", harmless=(None, True),
        no_effect="the loss of a call is the mean over its unmasked tokens, however they lie in micro-batches",
    )  # fmt: skip
    optimizer_cpu_offload: bool | None = option(
        "keep the optimizer's state in CPU memory", otherwise=False, no_effect=OWN_OPTIMIZER, harmless=(False,)
    )
    overlap_cpu_optimizer_d2h_h2d: bool | None = option(
        "copy it while computing", otherwise=False, no_effect=OWN_OPTIMIZER, harmless=(False,)
    )
    use_precision_aware_optimizer: bool | None = option(
        "keep it in 16 bits", otherwise=False, no_effect=OWN_OPTIMIZER, harmless=(False,)
    )
    no_load_optim: bool | None = option("load_state leaves the optimizer", otherwise=False, run="no_load_optim")
    no_save_optim: bool | None = option("save_state leaves it out", otherwise=False, run="no_save_optim")
    is_train_batch_min: bool = option("of loaders with several batch sizes the smallest is the micro-batch", True)
    # Read where a MegatronLMDummyScheduler is prepared. Lengths are in optimizer steps (iters) or samples.
    train_iters: int | None = option("steps of the run", run="train_iters")
    train_samples: int | None = option("samples of the run", run="train_samples")
    weight_decay_incr_style: str = option("constant, linear, cosine", "constant", run="weight_decay_incr_style")
    start_weight_decay: float | None = option("where it grows", run="start_weight_decay")
    end_weight_decay: float | None = option("where it grows", run="end_weight_decay")
    lr_decay_style: str = option("constant, linear, cosine, ...", "linear", run="lr_decay_style")
    lr_decay_iters: int | None = option("steps until min_lr", run="lr_decay_iters")
    lr_decay_samples: int | None = option("samples until min_lr", run="lr_decay_samples")
    lr_warmup_iters: int | None = option("steps of linear warm-up", run="lr_warmup_iters")
    lr_warmup_samples: int | None = option("samples of linear warm-up", run="lr_warmup_samples")
    lr_warmup_fraction: float | None = option("warm-up as part of the decay", run="lr_warmup_fraction")
    min_lr: float = option("learning rate at the end", 0.0, run="min_lr")
    # Of the optimizer's parameter groups.
    no_wd_decay_cond: Callable | None = option("(name, parameter) -> whether it has no weight decay")
    scale_lr_cond: Callable | None = option("(name, parameter) -> whether its rate is lr_mult times the others'")
    lr_mult: float = option("see scale_lr_cond", 1.0, least=0.0)
    # Of datasets, and of indexed ones above all.
    megatron_dataset_flag: bool = option("the loaders are MegatronLMDummyDataLoader", False)
    consumed_samples: list[int] | None = option("where training, validation and test data begin")
    seq_length: int | None = option("tokens of a sample (None: the loader's, or the model's)", run="seq_length")
    decoder_seq_length: int | None = option("tokens of a T5's decoder", run="decoder_seq_length")
    eod_mask_loss: bool | None = option("no loss behind an end of document", otherwise=False, run="eod_mask_loss")
    eval_iters: int = option("batches of a validation", 100, run="eval_iters")
    eval_interval: int = option("steps between validations", 1000, run="eval_interval")
    tensorboard_dir: str | None = option("where TensorBoard's files go", no_effect=TENSORBOARD)
    set_all_logging_options: bool = option("log all that Megatron can", False, no_effect=TRACKERS, harmless=(False,))
    return_logits: bool = option("outputs have logits beside the loss", False)
    custom_train_step_class: type | None = option("made with (args, **custom_train_step_kwargs)")
    custom_train_step_kwargs: dict | None = option("see custom_train_step_class")
    custom_model_provider_function: Callable | None = option("makes the model")
    custom_prepare_model_function: Callable | None = option("changes the model that was made")
    custom_megatron_datasets_provider_function: Callable | None = option("makes the three indexed datasets")
    custom_get_batch_function: Callable | None = option("see AbstractTrainStep")
    custom_loss_function: Callable | None = option("see AbstractTrainStep")
    other_megatron_args: dict | None = option("further arguments by Megatron's names")
    keep_weights: bool = option("False: random weights, as the guide has it", True)
    recompute_activation: dataclasses.InitVar[bool | None] = None  # these are OTHER_SPELLINGS, in its order
    require_logits: dataclasses.InitVar[bool | None] = None
    encoder_seq_length: dataclasses.InitVar[int | None] = None

    from_environment: set[str] = dataclasses.field(default_factory=set, init=False, repr=False)
    unread_variables: list[str] = dataclasses.field(default_factory=list, init=False, repr=False)
    parsed_args: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)  # see parsers.py
    megatron_lm_default_args: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    micro_batch_size: int | None = dataclasses.field(default=None, init=False, repr=False)
    data_parallel_size: int | None = dataclasses.field(default=None, init=False, repr=False)

    def __new__(cls, *_: Any, **given: Any) -> MegatronLMPlugin:
        """Raises ConfigError for a name that is no option."""
        if cls is MegatronLMPlugin and (unknown := [name for name in given if name not in cls.__dataclass_fields__]):
            near = nearest(unknown[0], cls.__dataclass_fields__)
            cure = f"Write {near}" if near else "Leave it out"
            raise ConfigError(problem("MegatronLMPlugin", unknown[0], "has no such option", cure))
        return super().__new__(cls)

    def __post_init__(self, *other_spellings: Any) -> None:
        problems = []
        for (other, name), value in zip(OTHER_SPELLINGS.items(), other_spellings, strict=True):
            now, default = getattr(self, name), options(self)[name].default
            if value is not None and now not in (default, value):
                rule = f"is another spelling of {name}, {now}, and must be equal to it"
                problems.append(problem(other, value, rule, f"Leave out {other}"))
            elif value is not None:
                setattr(self, name, value)
        self._take_other_args()
        problems += self._take_environment()
        for name, each in options(self).items():
            if getattr(self, name) is None:
                setattr(self, name, each.metadata["otherwise"])
        # What launchers set for any layout gives way.
        if self.tp_degree == 1 and "sequence_parallelism" in self.from_environment:
            self.sequence_parallelism = False
        if self.recompute_granularity is not None and "recompute_activations" in self.from_environment:
            self.recompute_activations = False
        if isinstance(self.consumed_samples, (list, tuple)):
            self.consumed_samples = [*self.consumed_samples, 0, 0, 0][: max(3, len(self.consumed_samples))]
        fail([*problems, *self.problems()])
        self.megatron_lm_default_args = {
            each.metadata["run"] or name: getattr(self, name) for name, each in options(self).items()
        } | dict(self.other_megatron_args or {})

    def __setattr__(self, name: str, value: Any) -> None:
        known = hasattr(type(self), name) or name in self.__dataclass_fields__
        if not known and (near := difflib.get_close_matches(name, options(self), 1, 0.85)):
            raise ConfigError(f"MegatronLMPlugin has no option {name}: did you mean {near[0]}?")
        super().__setattr__(name, value)

    @property
    def global_batch_size(self) -> int:
        """Samples of one call of the model on all processes. Raises ConfigError before a loader is prepared."""
        if self.micro_batch_size is None or self.data_parallel_size is None:
            raise ConfigError(
                "global_batch_size is not known before accelerator.prepare has been given a data loader, whose batch "
                "size is the micro-batch. Call accelerator.prepare(...) first."
            )
        return self.data_parallel_size * self.micro_batch_size * self.num_micro_batches

    def set_training_args(self, micro_batch_size: int, dp_degree: int) -> None:
        """Note the batch size of the loaders, in samples, and the number of data-parallel processes."""
        self.micro_batch_size, self.data_parallel_size = micro_batch_size, dp_degree
        names = ("data_parallel_size", "micro_batch_size", "global_batch_size")
        self.megatron_lm_default_args |= {name: getattr(self, name) for name in names}

    def args(self) -> megatron_args.MegatronArgs:
        """`other_megatron_args`, with what a parser of the model's config has added."""
        others = self.other_megatron_args if isinstance(self.other_megatron_args, Mapping) else {}
        where = "other_megatron_args" + " (or the parser of the model)" * bool(self.parsed_args)
        return megatron_args.read(self.parsed_args | dict(others), where)

    def run_fields(self) -> dict[str, Any]:
        """{field of RunConfig: value} of all that the plugin says and that acts; without what the model has itself."""
        pairs = ((each.metadata["run"], getattr(self, name)) for name, each in options(self).items())
        values = {run: value for run, value in pairs if run is not None and value is not None}
        if (asked := environment.truth(str(self.attention_backend))) is not None:
            values["attention_backend"] = "auto" if asked else "unfused"
        if self.use_custom_fsdp:
            values["data_parallel_sharding"] = "full"
        if self.recompute_granularity == "full":
            values.setdefault("recompute_method", "uniform")
        values |= self.args().active
        if self.tp_degree == 1:
            values["sequence_parallel"] = False  # `notices` says so
        return values

    def schedule_fields(self) -> dict[str, Any]:
        """Those of `run_fields` that say how the learning rate and the weight decay change: what a scheduler needs."""
        return {name: value for name, value in self.run_fields().items() if checks.is_of_schedule(name)}

    def problems(self) -> list[str]:
        """All that cannot work, whatever the model; it may have come about after the plugin was made."""
        return checks.find_problems(self)

    def notices(self) -> list[str]:
        """A line for each option that is given and does nothing here, or not all that it says."""
        args = self.args()
        return [*self._own_notices(), *self.unread_variables, *args.notices, *checks.data_notices(self, args)]

    def _own_notices(self) -> Iterator[str]:
        for name, each in options(self).items():
            why, value = each.metadata["no_effect"], getattr(self, name)
            if why is not None and value not in each.metadata["harmless"]:
                yield f"{name}={value!r} has no effect: {why}"
        if self.sequence_parallelism and self.tp_degree == 1:
            yield "sequence_parallelism=True has no effect: tp_degree is 1, and there is nothing to split among"
        if self.num_micro_batches < self.pp_degree:
            yield (
                f"num_micro_batches is {self.num_micro_batches}, less than the {self.pp_degree} pipeline stages, some "
                f"of which therefore always wait; num_micro_batches={4 * self.pp_degree} would keep them busy"
            )
        if self.custom_train_step_kwargs and self.custom_train_step_class is None:
            yield "custom_train_step_kwargs has no effect: there is no custom_train_step_class"
        if self.lr_mult != 1 and self.scale_lr_cond is None:
            yield "lr_mult has no effect: it is for parameters that scale_lr_cond names"
        if self.recompute_num_layers not in (None, 1) and self.recompute_granularity != "full":
            yield "recompute_num_layers has no effect: it is for recompute_granularity='full'"
        for name in INDEXED if not self.megatron_dataset_flag else ():
            if getattr(self, name) not in (options(self)[name].default, False):
                yield f"{name} has no effect: it is for indexed datasets (megatron_dataset_flag)"

    def _take_other_args(self) -> None:
        """Options that other_megatron_args names in Megatron's way, and nothing else gives."""
        values = self.args().values
        for name, each in options(self).items():
            if each.metadata["run"] in values and getattr(self, name) == each.default:
                setattr(self, name, values[each.metadata["run"]])

    def _take_environment(self) -> list[str]:
        """Options that are None, from MEGATRON_LM_*. Returns what is wrong with the variables."""
        problems, code_says = [], {name for name in options(self) if getattr(self, name) is not None}
        known = [name for name, each in options(self).items() if each.default is None and kind_of(each) in READERS]
        for variable, text in environment.megatron_lm_options().items():
            name, called = OTHER_SPELLINGS.get(variable, variable), f"MEGATRON_LM_{variable.upper()}"
            if name not in known:
                near = nearest(name, known)
                hint = f"; did you mean MEGATRON_LM_{near.upper()}?" if near else ""
                self.unread_variables.append(f"the environment variable {called} is read by nothing{hint}")
            elif name not in code_says:
                problems += self._take_variable(name, called, text)
        return problems

    def _take_variable(self, name: str, called: str, text: str) -> list[str]:
        read, rule = READERS[kind_of(options(self)[name])]
        value = read(text)
        if value is None:
            return [problem(f"The environment variable {called}", text, f"must be {rule}", "Correct it, or unset it")]
        if name in self.from_environment and getattr(self, name) != value:
            rule = f"is another spelling of a variable that says {getattr(self, name)}, and must be equal to it"
            return [problem(f"The environment variable {called}", text, rule, "Unset one of the two")]
        setattr(self, name, value)
        self.from_environment.add(name)
        return []


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


for _other, _name in OTHER_SPELLINGS.items():
    setattr(MegatronLMPlugin, _other, _alias(_name))
