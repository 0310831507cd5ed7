"""From recipe, YAML and flags to one RunConfig, and back to YAML. Recipe < YAML < flags; all mistakes found at once."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megalith.common.encodings import conversion_advice, reason
from megalith.common.errors import ConfigError, MegalithError, problem
from megalith.config import finetuning
from megalith.config.architectures import architecture
from megalith.config.checks.checks import find_problems, violated_limit
from megalith.config.checks.masking import masking_notices
from megalith.config.flags import flags, legacy
from megalith.config.flags.text import Problem, fail, flag, value_text
from megalith.config.flags.values import convert, fields
from megalith.config.flags.yaml_text import parse_yaml
from megalith.config.heads import headed
from megalith.config.megatron.counts import vocab_size_of_rows
from megalith.config.run import RunConfig
from megalith.config.sections.data import CORPUS_DATASETS, INSTRUCTIONS, TOKENIZER_FILES
from megalith.config.sections.retriever import RetrieverConfig

OF_DATASETS = {  # field -> the built-in datasets that read it
    "mask_prob": ("bert", "t5"),
    "short_seq_prob": ("bert", "t5"),
    "decoder_seq_length": ("t5", *INSTRUCTIONS),
    "titles_data_path": ("ict",),
    "use_one_sent_docs": ("ict",),
    "query_in_block_prob": ("ict",),
    "chat_template": ("chat",),
    **dict.fromkeys(("packing", "excess_length_strategy", "assistant_only_loss", "max_unusable"), INSTRUCTIONS),
    "block_samples_mapping": ("ict",),
    **dict.fromkeys(("retro_workdir", "retro_no_retrieval", "retro_freeze"), ("retro",)),
    **dict.fromkeys(RetrieverConfig.__annotations__, ("ict", "nq")),
    **dict.fromkeys(
        ("retriever_seq_length", "train_with_neg", "train_hard_neg", "val_av_rank_hard_neg", "val_av_rank_other_neg"),
        ("nq",),
    ),
}
ReadRecipe = Callable[[str], str]  # name -> YAML text
Values = Mapping[str, Any]  # of fields that recipe, file and flags set: --load, what a source may leave unsaid
ReadCheckpoint = Callable[[Values], str]  # -> YAML text of the config of what --load names
ReadTokenizer = Callable[[Values], dict[str, Any]]  # -> fields of its tokenizer; {} where there is none
TOKENIZER = ("tokenizer_type", *TOKENIZER_FILES)  # fields that identify a tokenizer


def load_config(argv: Sequence[str] = (), **options: Any) -> tuple[RunConfig, list[str]]:
    """A checked config from flags (also `--recipe` and `--config`), and the notices to show. Options: as resolve."""
    return resolve(flags.read(argv), **options)


def resolve(
    reading: flags.CommandLine,
    *,
    read_recipe: ReadRecipe | None = None,
    read_checkpoint: ReadCheckpoint | None = None,
    read_tokenizer: ReadTokenizer | None = None,
    world_size: int | Callable[[RunConfig], int] = 1,
    data: bool = True,
    corpus: bool = True,
    one_step: bool = False,
    paths: Callable[[RunConfig], Iterable[Problem]] = lambda config: (),
) -> tuple[RunConfig, list[str]]:
    """A checked config and the notices to show, from what flags.read found.

    read_recipe, read_checkpoint: for --recipe and --use-checkpoint-args; without them these flags are errors.
    read_tokenizer: for --use-checkpoint-args, where the command names no tokenizer itself.
    world_size: number of processes, or what gives it for the config. data, corpus, one_step: as checks.find_problems.
    paths: what is wrong with the files that a config names.
    Raises ConfigError with every problem of flags, files and their combination.
    """
    problems, notices = list(reading.problems), list(reading.notices)
    values: dict[str, Any] = {}
    chosen, models = reading.values, dict[str, str]()  # model_type -> the last source that names it
    for source, text in source_texts(chosen.get("recipe"), chosen.get("config"), read_recipe, problems):
        raw = parse_yaml(text, source, problems, notices)
        models |= {str(raw["model_type"]): source} if "model_type" in raw else {}
        values |= _typed({key: (value, f"{source}: {key}") for key, value in raw.items()}, problems)
    values |= _typed({key: (value, flag(key)) for key, value in chosen.items()}, problems)
    models |= {chosen["model_type"]: "--model-type"} if "model_type" in chosen else {}
    problems += [
        Problem((), f"unexpected {word!r}: a value follows its flag, and one model follows the verb")
        for word in reading.words[1:]
    ]
    if reading.words and not any("model_type" in each.fields for each in problems):
        _name_model(reading.words[0], values, models, problems)
    if (model := values.get("model_type")) is not None:
        notices += [
            f"the model is {model}, where {source} says {other}" for other, source in models.items() if other != model
        ]
    try:
        values |= finetuning.conclusions(values, notices)
    except ConfigError as error:  # what the task would have set is not missing as well
        problems.append(Problem(("task", "epochs", "train_iters", "dataset", "train_data", "valid_data"), str(error)))
    if values.get("use_checkpoint_args") and values.get("load"):
        values |= _model_of_checkpoint(values, read_checkpoint, problems, notices)
        values |= _tokenizer_of_checkpoint(values, read_tokenizer, problems, notices)
        if rows := values.get("vocab_size"):
            values["vocab_size"] = vocab_size_of_rows(rows, values.get("tokenizer_type"))
    config = complete(values, notices)
    notices += [
        f"{flag(name)} has no effect: only the dataset {' or '.join(readers)} reads it"
        for name, readers in OF_DATASETS.items()
        if name in values and config.data.dataset in CORPUS_DATASETS and config.data.dataset not in readers
    ]
    notices += masking_notices(config)
    wrong = {field for each in problems for field in each.fields}
    size = world_size if isinstance(world_size, int) else world_size(config)
    found = find_problems(config, size, data=data, corpus=corpus, one_step=one_step)
    problems += [each for each in found if not wrong.intersection(each.fields)]
    # A problem of all fields is a file that was not read: it says nothing of any one of them.
    wrong = {field for each in problems if len(each.fields) < len(fields()) for field in each.fields}
    problems += [each for each in paths(config) if not wrong.intersection(each.fields)]
    fail(each.text for each in problems)
    return config, notices


def _name_model(word: str, values: dict[str, Any], models: Mapping[str, str], problems: list[Problem]) -> None:
    """Take the model named after the verb.

    Recipe, file and flags may not contradict it, unless it is the user's (module:name).
    """
    named = values.get("model_type", word)
    if named not in fields()["model_type"].metadata["names"] and ":" not in named and named != word:
        return  # it is no model, which is a problem reported elsewhere
    if word != named and ":" not in word:
        rule = f"after the verb must be {named}, because {models[named]} is of a {named}"
        cure = f"Write {named} after the verb, or add --model-type {word} to have a {word} of that shape"
        problems.append(Problem(("model_type",), problem("The model", word, rule, cure)))
        return
    values["model_type"] = word


def source_texts(
    recipe: str | None, file: str | None, read_recipe: ReadRecipe | None, problems: list[Problem]
) -> list[tuple[str, str]]:
    """(what to call it, its text) of the recipe and of the YAML file, as far as they are named and readable."""
    found = []
    try:
        if recipe is not None:
            if read_recipe is None:
                raise ConfigError("--recipe has no effect here: this command reads no recipes. Leave it out.")
            found.append((f"recipe {recipe}", read_recipe(recipe)))
    except ConfigError as error:
        problems.append(Problem(tuple(fields()), str(error)))  # what the recipe would have set is not missing as well
    try:
        if file is not None:
            found.append((file, pathlib.Path(file).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        cure = "Correct the path; megalith config writes such a file"
        if isinstance(error, UnicodeDecodeError):
            cure = conversion_advice([reason(error)]).rstrip(". ")
        why = getattr(error, "strerror", None) or str(error)
        text = problem("--config", file, f"must name a readable YAML file ({why})", cure)
        problems.append(Problem(tuple(fields()), text))
    return found


def _model_of_checkpoint(
    values: Mapping[str, Any], read: ReadCheckpoint | None, problems: list[Problem], notices: list[str]
) -> dict[str, Any]:
    """The model section that the checkpoint of --load was trained with."""
    folder, asked = values["load"], values.get("model_type")
    try:
        if read is None:
            text = "--use-checkpoint-args has no effect here: this command reads no checkpoint. Leave it out."
            raise ConfigError(text)
        model = from_yaml(read(values), f"config of {folder}").model
    except MegalithError as error:
        problems.append(Problem(tuple(fields()), str(error)))  # what it would have set is not missing as well
        return {}
    if (
        asked is not None
        and asked != model.model_type
        and architecture(asked).head_of == (model.architecture.head_of or model.model_type)
    ):
        model = headed(model, values)
    if asked not in (None, model.model_type):
        rule = f"must be {model.model_type}, that of {folder}, because of --use-checkpoint-args"
        cure = f"Write megalith pretrain {model.model_type}"
        problems.append(Problem(("model_type",), problem("The model", asked, rule, cure)))
        return {}
    notices.append(f"--use-checkpoint-args: the model is that of {folder}, whatever recipe, YAML and flags say")
    there = dict(vars(model))
    for name, value in there.items():
        if values.get(name, value) != value and name != "vocab_size":
            notices.append(f"{flag(name)} is {value_text(value)} there, and not {value_text(values[name])}")
    return there


def _tokenizer_of_checkpoint(
    values: Mapping[str, Any], read: ReadTokenizer | None, problems: list[Problem], notices: list[str]
) -> dict[str, Any]:
    """The tokenizer in the checkpoint of --load, unless the command names another."""
    folder = values["load"]
    if read is None or any(len(each.fields) == len(fields()) for each in problems):  # the folder could not be read
        return {}
    try:
        found = {name: value for name, value in read(values).items() if name in fields() and value is not None}
    except MegalithError as error:
        problems.append(Problem(TOKENIZER, str(error)))
        return {}
    found.pop("vocab_size", None)  # that of the model
    kind = found.get("tokenizer_type")
    named = [name for name in TOKENIZER if values.get(name) and (name != "tokenizer_type" or values[name] != kind)]
    if kind and named:
        typed = ", ".join(f"{flag(name)} {values[name]}" for name in named)
        notices.append(f"--use-checkpoint-args: the tokenizer is that of {typed}, not the {kind} in {folder}")
    elif kind:
        notices.append(f"--use-checkpoint-args: the tokenizer is that of {folder}, a {kind}")
        return found
    return {}


def _typed(raw: Mapping[str, tuple[Any, str]], problems: list[Problem]) -> dict[str, Any]:
    """Typed values of (raw value, what to call it) by field."""
    values = {}
    for key, (value, called) in raw.items():
        typed_as = legacy.IN_TOKENS.get(key, key)
        if typed_as not in fields():
            continue  # a flag of the verb itself
        values[key], failure = convert(fields()[typed_as], value, called)
        if failure:
            problems.append(failure)
            del values[key]
    return values


def typed_config(reading: flags.CommandLine) -> tuple[RunConfig, dict[str, Any]]:
    """The config that the words of a verb without recipe, YAML and training describe, and the fields that they set.

    What follows from them is not filled in. Raises ConfigError with all that is wrong with each of them.
    """
    problems = list(reading.problems)
    values = _typed({key: (value, flag(key)) for key, value in reading.values.items()}, problems)
    for name, value in values.items():
        if name in fields() and (violated := violated_limit(name, value)):
            problems.append(Problem((name,), problem(flag(name), value, *violated)))
    fail(each.text for each in problems)
    values = {name: value for name, value in values.items() if name in fields()}
    return RunConfig().replace(**values), values


def complete(values: Mapping[str, Any], notices: list[str]) -> RunConfig:
    """A RunConfig of these values, with what follows from them filled in; each conclusion is added to the notices."""
    defaults, tokenizer_of_vocabulary = model_defaults(values.get("model_type", fields()["model_type"].default))
    values = defaults | dict(values)
    sequence, positions = values.get("seq_length"), values.get("max_position_embeddings")
    if sequence and positions is None:
        values["max_position_embeddings"] = sequence
        notices.append(f"--max-position-embeddings is not given: it is --seq-length, {sequence}")
    elif positions and sequence is None:
        values["seq_length"] = positions
        notices.append(f"--seq-length is not given: it is --max-position-embeddings, {positions}")
    _tokens_to_samples(values, notices)
    if values.get("tokenizer_type") is None:
        kind = None
        if values.get("merge_file"):
            kind = "GPT2BPETokenizer"
        elif values.get("vocab_file"):
            kind = tokenizer_of_vocabulary
        elif values.get("tokenizer_model"):
            kind = "HuggingFaceTokenizer"
        if kind:
            values["tokenizer_type"] = kind
            notices.append(f"--tokenizer-type is not given: the files are of a {kind}")
    config = RunConfig().replace(**values)
    m = config.model
    if m.activation == "gelu" and not m.add_bias_linear and "bias_gelu_fusion" not in values:
        notices.append(
            "GELU is the exact one (erf): Megatron's fused one needs biases, "
            "and Megatron stops here without --no-bias-gelu-fusion"
        )
    return config


def model_defaults(model_type: str) -> tuple[dict[str, Any], str]:
    """Fields that follow from the model where nothing sets them, and the tokenizer that a vocabulary file means."""
    try:
        record = architecture(model_type)
    except ConfigError:  # a name of no model, which is a problem reported elsewhere
        return {}, RunConfig().model.architecture.tokenizer_type
    return record.defaults | {"name": record.name}, record.tokenizer_type


def _tokens_to_samples(values: dict[str, Any], notices: list[str]) -> None:
    """Replace counts of tokens by counts of samples, rounded up."""
    for tokens, samples in legacy.IN_TOKENS.items():
        count, sequence = values.pop(tokens, None), values.get("seq_length")
        if count is not None and sequence:
            values[samples] = -(-count // sequence)
            read_as = f"{flag(samples)} {values[samples]} (of --seq-length {sequence} tokens)"
            notices.append(f"{flag(tokens)} {count} is read as {read_as}")


def to_yaml(config: RunConfig, *, changed_only: bool = False, always: Sequence[str] = ()) -> str:
    """YAML by section, which from_yaml reads back to an equal config.

    changed_only: leave out fields that have their default, except those in `always`.
    """
    import yaml

    tree: dict[str, dict[str, Any]] = {}
    for name, value in config.flat().items():
        field = fields()[name]
        if not changed_only or name in always or value != field.default:
            tree.setdefault(field.section, {})[name] = value
    return yaml.safe_dump(tree, sort_keys=False, width=140) if tree else ""


def from_yaml(text: str, source: str = "config") -> RunConfig:
    """The RunConfig of a YAML text (what to_yaml wrote, or a hand-written one), typed but not checked.

    Raises ConfigError with every unknown key and every value of the wrong type.
    """
    problems: list[Problem] = []
    notices: list[str] = []
    raw = parse_yaml(text, source, problems, notices)
    values = _typed({key: (value, f"{source}: {key}") for key, value in raw.items()}, problems)
    _tokens_to_samples(values, notices)
    fail(each.text for each in problems)
    return RunConfig().replace(**values)


def stored_config(text: str, source: str) -> RunConfig:
    """`from_yaml` of the config in a checkpoint. Raises ConfigError with all values that are outside their limits."""
    config = from_yaml(text, source)
    wrong = [(name, value, violated_limit(name, value)) for name, value in config.flat().items()]
    fail(problem(f"{source}: {name}", value, *found) for name, value, found in wrong if found)
    return config
