"""What `--dry-run` looks at beside the config: the number of processes that it is meant for, and the files that it names. No torch."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator

from megalith.common.errors import MegalithError, problem
from megalith.config import flags, launched
from megalith.config.data import TOKENIZER_FILES, DataConfig, unnamed_files
from megalith.config.loading import from_yaml
from megalith.config.loading_yaml import about
from megalith.config.run import RunConfig
from megalith.config.text import Problem, flag

ON_THE_HUB = ("HuggingFaceTokenizer", "HFTokenizer")
OURS = ("gpt", "bert", "t5", "ict")  # datasets made from a corpus; one's own may need none


def number_of_processes(reading: flags.Reading, texts: Iterable[tuple[str, str]]) -> Callable[[RunConfig], tuple[int, str]]:
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
            return number, f"--world-size is not given: checked for {number} processes, as {source} says" if number > 1 else ""
        instead = f", as the {number} that {source} says is no multiple of it" if number > 1 else ""
        return fewest, f"--world-size is not given: checked for {fewest} processes, the fewest of this layout{instead}"

    return meant


def missing(config: RunConfig) -> list[str]:
    """A line for each corpus, tokenizer file or checkpoint that is not there, is damaged, or is not named by the config."""
    return [*_corpora(config.data), *_tokenizer(config.data), *_checkpoint(config)]


def _corpora(data: DataConfig) -> Iterator[str]:
    from megalith.data.sources import Source, read_list, sources_of  # here, because numpy takes a moment
    from megalith.data.tntidx import open_indexed

    paths = {name: getattr(data, name) for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path")}
    ways: list[tuple[str, Callable[[], list[Source]]]] = [
        (flag(name), functools.partial(sources_of, given, flag(name))) for name, given in paths.items() if given
    ]
    if data.data_file_list:
        ways.append(("--data-file-list", functools.partial(read_list, data.data_file_list)))
    if not ways and data.dataset in OURS:
        yield "--data-path is not given: the name of a corpus, as `megalith data preprocess` gave it"
    if data.titles_data_path:
        ways.append(("--titles-data-path", lambda: [Source(data.titles_data_path)]))
    for name, sources in ways:
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
    if data.tokenizer_type is None:
        yield "--tokenizer-type is not given, nor a tokenizer's files: the data was made with one, and it has the vocabulary"
    for name in TOKENIZER_FILES:
        value = getattr(data, name)
        if value is None or pathlib.Path(value).exists():
            continue
        bare = name == "tokenizer_model" and data.tokenizer_type in ON_THE_HUB and not pathlib.Path(value).suffix
        hub = ", and the Hugging Face Hub would be asked for it" if bare else ""
        yield f"{flag(name)}: there is no {value} here{hub}"
    yield from (f"{flag(name)} is not given: {data.tokenizer_type} is made from it" for name in unnamed_files(data))


def _checkpoint(config: RunConfig) -> Iterator[str]:
    """What is wrong with --load: it is not there, or of another model. No torch, unless it is another program's."""
    from megalith.checkpoint import facts, fit, folder

    load = folder.load_of(config)
    if load is None:  # a run's own folder may be empty: it begins then
        return
    if re.match(r"https?://", load):
        yield f"--load: {load} is not judged before the run fetches it"
        return
    try:
        if folder.is_ours(load) or not pathlib.Path(load).exists():
            then = from_yaml(facts.read_config(folder.find(load, config.checkpoint.ckpt_step)))
        else:
            from megalith.checkpoint import foreign

            then = foreign.read(load, foreign.options_of(config)).config
        if another := fit.another_model(load, config.model, then.model):
            yield f"--load: {another}"
    except MegalithError as error:
        yield f"--load: {error}"
