"""Checks beside the config: the files that it names, and the number of processes of a `--dry-run`. No torch."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megalith.common.environment import has_launcher
from megalith.common.errors import MegalithError, problem
from megalith.common.urls import is_url
from megalith.config import environment
from megalith.config.flags import flags
from megalith.config.flags.loading import from_yaml
from megalith.config.flags.text import Problem, field_problem, flag
from megalith.config.flags.yaml_text import about
from megalith.config.heads import with_head
from megalith.config.run import RunConfig
from megalith.config.sections.data import (
    CORPUS_DATASETS,
    INSTRUCTIONS,
    MADE_FROM,
    TOKENIZER_FILES,
    DataConfig,
    missing_tokenizer_files,
)

NUMBER = re.compile(r"[0-9.]+(e-?[0-9]+)?")  # a weight before a path
ON_THE_HUB = ("HuggingFaceTokenizer", "HFTokenizer")
CORPORA = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_file_list", "titles_data_path")


def number_of_processes(
    reading: flags.CommandLine, texts: Iterable[tuple[str, str]]
) -> Callable[[RunConfig], tuple[int, str]]:
    """A function of a config: the processes to check it for, and a line on the origin of that number ('' if obvious).

    A run that is not dry has as many as were started. texts: (name, YAML text) of recipe and config; the last one wins.
    Problems are added to the reading's; raises ConfigError where a launcher's variables are wrong.
    """
    started, launcher = environment.world_size(), has_launcher()
    asked, dry = flags.whole_number(reading, "world_size"), reading.values.get("dry_run")
    if asked not in (None, started) and not dry:
        cure = f"Start {asked} with torchrun --nproc-per-node or another launcher, or add --dry-run, which needs none"
        rule = f"must be the number of processes that were started ({started})"
        reading.problems.append(Problem((), problem("--world-size", asked, rule, cure)))
    if launcher or not dry:
        number = asked if asked and dry else started
        line = f"checked for --world-size {number}, where {started} were started" if number != started else ""
        return lambda config: (number, line)
    if asked is not None:
        return lambda config: (asked, "")
    stated = [(source, about(text).get("processes")) for source, text in texts]
    source, number = next((each for each in reversed(stated) if isinstance(each[1], int) and each[1] > 0), ("", 1))

    def fitting(config: RunConfig) -> tuple[int, str]:
        fewest = config.parallel.least_processes
        if number % fewest == 0:
            return (
                number,
                f"--world-size is not given: checked for {number} processes, as {source} says" if number > 1 else "",
            )
        instead = f", as the {number} that {source} says is no multiple of it" if number > 1 else ""
        return fewest, f"--world-size is not given: checked for {fewest} processes, the fewest of this layout{instead}"

    return fitting


def faults(config: RunConfig) -> list[str]:
    """A line for each corpus, tokenizer file or checkpoint that the config names and that is not there, or damaged."""
    return [*_corpora(config.data), *_tokenizer(config.data), *_task(config), *_checkpoint(config)]


def wrong_paths(config: RunConfig) -> Iterator[Problem]:
    """Problems of paths that a run names and that do not exist, for a command's list of mistakes. Nothing is opened."""
    for name, sources in _corpus_fields(config.data):
        from megalith.data.indexed.format import resolve_prefix  # here, because numpy takes a moment

        try:
            for source in sources():
                resolve_prefix(source.prefix)
        except MegalithError as error:
            text = str(error)
            yield Problem(
                (name,), text if text.startswith((f"{flag(name)} ", f"{flag(name)}:")) else f"{flag(name)}: {text}"
            )
    data, c = config.data, config.checkpoint
    for name in MADE_FROM.get(data.tokenizer_type or "", TOKENIZER_FILES if data.tokenizer_type in ON_THE_HUB else ()):
        if _absent(name, data):
            yield field_problem(
                (name,),
                flag(name),
                getattr(data, name),
                "must name a file that exists",
                f"Correct the path after {flag(name)}",
            )
    for name, path in _task_files(config):
        if not pathlib.Path(path).exists():
            rule, cure = "must name files or folders that exist", "Correct the path"
            yield field_problem((name,), flag(name), path, rule, cure)
    if c.load and not c.use_checkpoint_args:  # with --use-checkpoint-args it has been read already
        yield from _wrong_load(config)


def named_files(config: RunConfig) -> list[str]:
    """Every file that a run of the config reads: corpora, lists, the tokenizer's files and what --load names."""
    data, found = config.data, list[str]()
    for name, sources in _corpus_fields(data):
        if name == "data_file_list":
            found.append(data.data_file_list or "")
        with contextlib.suppress(MegalithError, OSError):  # a list that is missing is found by its own name
            found += [f"{source.prefix}{end}" for source in sources() for end in (".bin", ".idx")]
    found += [getattr(data, name) for name in TOKENIZER_FILES if getattr(data, name) and not _is_hub_name(name, data)]
    found += [data.data_weights_schedule] if data.data_weights_schedule else []
    found += [path for _, path in _task_files(config)]
    load = config.checkpoint.load
    if load and not is_url(load) and load not in (config.checkpoint.save, config.run_folder):
        found.append(load)
    return list(dict.fromkeys(found))


def written_folders(config: RunConfig) -> list[str]:
    """The folders that a run writes: its record, its checkpoints, the index cache where one is named."""
    folders = [config.run_folder, config.checkpoint.save, config.data.data_cache_path]
    return list(dict.fromkeys(str(each) for each in folders if each))


def _wrong_load(config: RunConfig) -> Iterator[Problem]:
    from megalith.checkpoint.store import folder  # here, because few runs need it

    load = folder.load_path(config)
    if (
        load is None
        or is_url(load)
        or (config.checkpoint.finetune and folder.iterations(folder.checkpoint_folder(config)))
    ):
        return  # it is not needed, or not downloaded yet
    if not pathlib.Path(load).exists():
        yield field_problem(("load",), "--load", load, "must name a file or folder that exists", "Correct the path")
    elif not folder.is_megalith(load) and not folder.describe_foreign(load) and (runs := folder.describe_runs(load)):
        yield Problem(("load",), f"--load: {runs}")


def _corpus_fields(data: DataConfig) -> list[tuple[str, Callable[[], list[Any]]]]:
    """(field, function that returns the Sources that it names) of each field that names corpora."""

    def sources(name: str) -> list[Any]:
        from megalith.data.sources import Source, parse_data_path, read_file_list  # here, because numpy takes a moment

        if name == "data_file_list":
            return read_file_list(data.data_file_list or "")
        given = getattr(data, name)
        return [Source(given)] if name == "titles_data_path" else parse_data_path(given, flag(name))

    return [(name, functools.partial(sources, name)) for name in CORPORA if getattr(data, name)]


def unnamed(data: DataConfig) -> Iterator[str]:
    """A line for each thing that a run needs and that the config does not name, or that is not on this machine."""
    if (
        not any(getattr(data, name) for name in CORPORA if name != "titles_data_path")
        and data.dataset in CORPUS_DATASETS
    ):
        yield "--data-path is not given: the name of a corpus, as `megalith data preprocess` gave it"
    if data.tokenizer_type is None:
        yield (
            "--tokenizer-type is not given, nor a tokenizer's files: "
            "the data was made with one, and it has the vocabulary"
        )
    name, value = "tokenizer_model", data.tokenizer_model
    if value is not None and _is_hub_name(name, data) and not pathlib.Path(value).exists():
        yield f"{flag(name)}: there is no {value} here, and the Hugging Face Hub would be asked for it"
    yield from (
        f"{flag(name)} is not given: {data.tokenizer_type} is made from it" for name in missing_tokenizer_files(data)
    )


def _is_hub_name(name: str, data: DataConfig) -> bool:
    """Whether a field names a tokenizer of the Hub rather than a file."""
    return (
        name == "tokenizer_model" and data.tokenizer_type in ON_THE_HUB and not pathlib.Path(getattr(data, name)).suffix
    )


def _absent(name: str, data: DataConfig) -> bool:
    """Whether a field names a file that is not there; a tokenizer of the Hub is no file."""
    value = getattr(data, name)
    return value is not None and not pathlib.Path(value).exists() and not _is_hub_name(name, data)


def _corpora(data: DataConfig) -> Iterator[str]:
    from megalith.data.indexed.tntidx import open_indexed  # here, because numpy takes a moment

    for field, sources in _corpus_fields(data):
        name = flag(field)
        try:
            found = sources()
        except MegalithError as error:
            yield str(error)
            continue
        for source in found:
            try:
                if not open_indexed(source.prefix).num_documents:  # its header and the sizes of both files are judged
                    yield f"{name}: {source.prefix} has no documents"
            except MegalithError as error:
                yield f"{name}: {error}"
    if data.data_weights_schedule and not pathlib.Path(data.data_weights_schedule).is_file():
        yield f"--data-weights-schedule: there is no file {data.data_weights_schedule}"


def _task(config: RunConfig) -> Iterator[str]:
    for name, path in _task_files(config):
        if not pathlib.Path(path).exists():
            yield f"{flag(name)}: there is no {path} here"


def _task_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(field, path) of the files that a task reads; those to train on may have weights between them (chats)."""
    f = config.finetuning
    weighted = config.data.dataset in INSTRUCTIONS
    yield from (("train_data", path) for path in f.train_data if not (weighted and NUMBER.fullmatch(path)))
    yield from (("valid_data", path) for path in f.valid_data)
    if config.data.chat_template is not None:
        yield "chat_template", config.data.chat_template


def _tokenizer(data: DataConfig) -> Iterator[str]:
    for name in TOKENIZER_FILES:
        if _absent(name, data):
            yield f"{flag(name)}: there is no {getattr(data, name)} here"


def _checkpoint(config: RunConfig) -> Iterator[str]:
    """What is wrong with --load: it does not exist, or is of another model. torch only for another program's files."""
    from megalith.checkpoint.store import facts, fit, folder

    load = folder.load_path(config)
    if load is None:  # a run's own folder may be empty: it begins then
        return
    if is_url(load):
        yield f"--load: {load} is not checked before the run fetches it"
        return
    try:
        if folder.is_megalith(load) or not pathlib.Path(load).exists():
            then = from_yaml(facts.read_config(folder.find(load, config.checkpoint.ckpt_step)))
        else:
            from megalith.checkpoint.formats import foreign

            then = foreign.read(load, foreign.read_options(config)).config
        if another := fit.describe_model_difference(load, config.model, with_head(then.model, config.model)):
            yield f"--load: {another}"
    except MegalithError as error:
        yield f"--load: {error}"
