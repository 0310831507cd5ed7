"""What is looked at beside the config: the files that it names, and the number of processes of a `--dry-run`. No torch."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megalith.checkpoint.formats.sources import is_url
from megalith.common.errors import MegalithError, problem
from megalith.config import launched
from megalith.config.flags import flags
from megalith.config.flags.loading import from_yaml
from megalith.config.flags.text import Problem, flag, trouble
from megalith.config.flags.yaml_text import about
from megalith.config.run import RunConfig
from megalith.config.sections.data import MADE_FROM, TOKENIZER_FILES, DataConfig, unnamed_files

ON_THE_HUB = ("HuggingFaceTokenizer", "HFTokenizer")
CORPORA = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_file_list", "titles_data_path")
OURS = ("gpt", "bert", "t5", "ict")  # datasets made from a corpus; one's own may need none


def number_of_processes(
    reading: flags.Reading, texts: Iterable[tuple[str, str]]
) -> Callable[[RunConfig], tuple[int, str]]:
    """What gives, for a config, the processes to check it for, and a line on where that number is from ('' where it needs none).

    A run that is not dry has as many as were started. texts: (name, YAML text) of recipe and config, the stronger one last.
    What is wrong is added to the reading's problems; raises ConfigError where a launcher's variables are wrong.
    """
    started, launcher = launched.world_size(), "WORLD_SIZE" in os.environ
    asked, dry = flags.whole_number(reading, "world_size"), reading.values.get("dry_run")
    if asked not in (None, started) and not dry:
        cure = f"Start {asked} with torchrun --nproc-per-node or another launcher, or add --dry-run, which needs none"
        rule = f"the number of processes that were started is {started}"
        reading.problems.append(Problem((), problem("--world-size", asked, rule, cure)))
    if launcher or not dry:
        number = asked if asked and dry else started
        line = f"checked for --world-size {number}, where {started} were started" if number != started else ""
        return lambda config: (number, line)
    if asked is not None:
        return lambda config: (asked, "")
    said = [(source, about(text).get("processes")) for source, text in texts]
    source, number = next((each for each in reversed(said) if isinstance(each[1], int) and each[1] > 0), ("", 1))

    def meant(config: RunConfig) -> tuple[int, str]:
        fewest = config.parallel.least_processes
        if number % fewest == 0:
            return (
                number,
                f"--world-size is not given: checked for {number} processes, as {source} says" if number > 1 else "",
            )
        instead = f", as the {number} that {source} says is no multiple of it" if number > 1 else ""
        return fewest, f"--world-size is not given: checked for {fewest} processes, the fewest of this layout{instead}"

    return meant


def faults(config: RunConfig) -> list[str]:
    """A line for each corpus, tokenizer file or checkpoint that the config names and that is not there, or damaged."""
    return [*_corpora(config.data), *_tokenizer(config.data), *_checkpoint(config)]


def wrong_paths(config: RunConfig) -> Iterator[Problem]:
    """What a run names and is not there, told with the other mistakes of a command. Nothing is opened."""
    for name, sources in _ways(config.data):
        from megalith.data.indexed.format import resolve_prefix  # here, because numpy takes a moment

        try:
            for source in sources():
                resolve_prefix(source.prefix)
        except MegalithError as error:
            yield Problem((name,), f"{flag(name)}: {str(error).removeprefix(f'{flag(name)}: ')}")
    data, c = config.data, config.checkpoint
    for name in MADE_FROM.get(data.tokenizer_type or "", TOKENIZER_FILES if data.tokenizer_type in ON_THE_HUB else ()):
        if _absent(name, data):
            yield trouble(
                (name,),
                flag(name),
                getattr(data, name),
                "there is no such file",
                f"Correct the path after {flag(name)}",
            )
    yield from _wrong_load(config) if c.load and not c.use_checkpoint_args else ()  # which has read it


def _wrong_load(config: RunConfig) -> Iterator[Problem]:
    from megalith.checkpoint.store import folder  # here, because few runs need it

    load = folder.load_of(config)
    if load is None or is_url(load) or (config.checkpoint.finetune and folder.iterations(folder.folder_of(config))):
        return  # it is not needed, or not here yet
    if not pathlib.Path(load).exists():
        yield trouble(("load",), "--load", load, "there is no such file or folder", "Correct the path")
    elif not folder.is_ours(load) and not folder.strange(load) and (runs := folder.runs_in(load)):
        yield Problem(("load",), f"--load: {runs}")


def _ways(data: DataConfig) -> list[tuple[str, Callable[[], list[Any]]]]:
    """(field, what gives the Sources that it names) of each field that names corpora."""

    def sources(name: str) -> list[Any]:
        from megalith.data.sources import Source, read_list, sources_of  # here, because numpy takes a moment

        if name == "data_file_list":
            return read_list(data.data_file_list or "")
        given = getattr(data, name)
        return [Source(given)] if name == "titles_data_path" else sources_of(given, flag(name))

    return [(name, functools.partial(sources, name)) for name in CORPORA if getattr(data, name)]


def unnamed(data: DataConfig) -> Iterator[str]:
    """A line for each thing that a run needs and the config does not name, or names by what is not on this machine."""
    if not any(getattr(data, name) for name in CORPORA if name != "titles_data_path") and data.dataset in OURS:
        yield "--data-path is not given: the name of a corpus, as `megalith data preprocess` gave it"
    if data.tokenizer_type is None:
        yield "--tokenizer-type is not given, nor a tokenizer's files: the data was made with one, and it has the vocabulary"
    name, value = "tokenizer_model", data.tokenizer_model
    if value is not None and _bare(name, data) and not pathlib.Path(value).exists():
        yield f"{flag(name)}: there is no {value} here, and the Hugging Face Hub would be asked for it"
    yield from (f"{flag(name)} is not given: {data.tokenizer_type} is made from it" for name in unnamed_files(data))


def _bare(name: str, data: DataConfig) -> bool:
    """Whether a field names a tokenizer of the Hub rather than a file."""
    return (
        name == "tokenizer_model" and data.tokenizer_type in ON_THE_HUB and not pathlib.Path(getattr(data, name)).suffix
    )


def _absent(name: str, data: DataConfig) -> bool:
    """Whether a field names a file that is not there; a tokenizer of the Hub is none."""
    value = getattr(data, name)
    return value is not None and not pathlib.Path(value).exists() and not _bare(name, data)


def _corpora(data: DataConfig) -> Iterator[str]:
    from megalith.data.indexed.tntidx import open_indexed  # here, because numpy takes a moment

    for field, sources in _ways(data):
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


def _tokenizer(data: DataConfig) -> Iterator[str]:
    for name in TOKENIZER_FILES:
        if _absent(name, data):
            yield f"{flag(name)}: there is no {getattr(data, name)} here"


def _checkpoint(config: RunConfig) -> Iterator[str]:
    """What is wrong with --load: it is not there, or of another model. No torch, unless it is another program's."""
    from megalith.checkpoint.store import facts, fit, folder

    load = folder.load_of(config)
    if load is None:  # a run's own folder may be empty: it begins then
        return
    if is_url(load):
        yield f"--load: {load} is not judged before the run fetches it"
        return
    try:
        if folder.is_ours(load) or not pathlib.Path(load).exists():
            then = from_yaml(facts.read_config(folder.find(load, config.checkpoint.ckpt_step)))
        else:
            from megalith.checkpoint.formats import foreign

            then = foreign.read(load, foreign.options_of(config)).config
        if another := fit.another_model(load, config.model, then.model):
            yield f"--load: {another}"
    except MegalithError as error:
        yield f"--load: {error}"
