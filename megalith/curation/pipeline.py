"""Several steps one after another, by a YAML file; the last ones may be `data preprocess`'s own flags.

    input: [crawl/*.jsonl.zst]
    output: train.jsonl
    steps:
      - clean: {language: en, rules: [openwebtext]}
      - dedup: {threshold: 0.8}
      - shuffle: {seed: 1234}

A step's settings are its flags with underscores. Each step writes a file into OUTPUT.steps/, and the last one OUTPUT; a
step that is done is not done again. One report holds all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.files import sampled_digest
from megalith.common.locks import locked
from megalith.config.flags.text import Words, flag, unknown
from megalith.curation.commands import COMMANDS
from megalith.curation.report import REPORTS, write_report
from megalith.curation.run import Command, Notice, RunOptions, check_options, execute, quiet
from megalith.curation.run_state import SAMPLES, update_with_files
from megalith.data.corpus.preprocess_options import update_with_inputs
from megalith.data.tokenizers.tokenizer import TokenizerOptions

RUN_KEYS = ("json_key", "on_error", "max_unusable", "dropped")  # of RunOptions, that a step may have
CHECKS: dict[str, tuple[tuple[type, ...], str]] = {  # type of a setting -> types of its values, and what they are
    "str": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "tuple[str, ...]": ((list, tuple), "a list of texts"),
}


def build_command(name: str, settings: Mapping[str, Any]) -> Command:
    """The command of a verb with some settings. Raises ConfigError that lists what is wrong with them."""
    cls = COMMANDS.find(name)
    fields = {each.name: each for each in dataclasses.fields(cls)}
    problems, values = [], dict(settings)
    for key, value in settings.items():
        if key not in fields:
            problems.append(unknown("setting", key, fields, f"{name} has {', '.join(fields)}"))
            continue
        each = fields[key]
        kinds, text = CHECKS.get(str(each.type), ((), ""))
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            problems.append(problem(flag(key), value, f"must be {text}", "Correct it"))
            continue
        if isinstance(value, list):
            values[key] = tuple(map(str, value))
        if key == "tokenizer" and isinstance(value, Mapping):
            names = [each.name for each in dataclasses.fields(TokenizerOptions)]
            wrong = [
                unknown("setting", name, names, f"a tokenizer has {', '.join(names)}")
                for name in value
                if name not in names
            ]
            problems += wrong
            if "tokenizer_type" not in value:
                problems.append("tokenizer: tokenizer_type must be given")
            elif not wrong:
                values[key] = TokenizerOptions(**value)
            continue
        minimum, choices = each.metadata.get("minimum"), each.metadata.get("choices")
        if minimum is not None and value < minimum:
            problems.append(problem(flag(key), value, f"must be {minimum} or more", "Correct it"))
        if choices and value not in choices:
            problems.append(problem(flag(key), value, f"must be one of {', '.join(choices)}", "Choose one"))
    if problems:
        raise ConfigError("\n".join(problems))
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The steps of a file: a command each, and what of RunOptions it has of its own."""

    input: tuple[str, ...]
    output: str
    steps: tuple[tuple[Command, dict[str, Any]], ...]

    def outputs(self) -> list[str]:
        """The file that each step writes."""
        names = [f"{self.output}.steps/{i}-{step.name}.jsonl" for i, (step, _) in enumerate(self.steps)]
        return [*names[:-1], self.output]

    def evidence(self) -> list[tuple[int, str, str]]:
        """(step, what it writes beside its documents, where that stays once those between the steps are gone)."""
        return [
            (number, f"{output}.{end}", f"{self.output}.{number}-{step.name}.{end}")
            for number, ((step, _), output) in enumerate(zip(self.steps[:-1], self.outputs()))
            for end in step.beside
        ]

    def fingerprint(self) -> str:
        """Digest of the input, and of the steps with their settings and the files that these name."""
        steps = [(step.name, dataclasses.asdict(step), own) for step, own in self.steps]
        digest = hashlib.sha256(json.dumps(steps, default=str).encode())
        for (step, _), output in zip(self.steps, self.outputs()):
            update_with_files(digest, step.files(output))
        update_with_inputs(digest, self.steps[0][0].find_inputs(self.input))
        return digest.hexdigest()

    def plan(self) -> list[str]:
        """What would be done, a line for each step."""
        return [f"{step.name}: {output}" for (step, _), output in zip(self.steps, self.outputs())]


def read_pipeline(path: str) -> Pipeline:
    """The pipeline of a YAML file. Raises ConfigError that lists what is wrong."""
    try:
        content = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(problem(path, Words(str(error)), "must be YAML", "Correct it")) from error
    known = ("input", "output", "steps")
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list) or not content["steps"]:
        rule = "must have input, output and a list of steps"
        raise ConfigError(problem(path, content, rule, "See docs/corpus.md"))
    problems = [unknown("key", key, known, f"there are {', '.join(known)}") for key in content if key not in known]
    inputs, output = content.get("input"), content.get("output")
    inputs = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(inputs, list) or not isinstance(output, str):
        problems.append(problem(path, content.get("input"), "must name input files and one output", "Add them"))
    steps = []
    for entry in content["steps"]:
        entry = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())) or {}, dict):
            problems.append(
                problem("a step", entry, "must be a verb and its settings", "Write `- clean: {language: en}`")
            )
            continue
        ((name, settings),) = entry.items()
        settings = dict(settings or {})
        own = {key: settings.pop(key) for key in RUN_KEYS if key in settings}
        try:
            command = build_command(name, settings)
            check_options(command, RunOptions(input=(), output=output or "", **own))
            steps.append((command, own))
        except ConfigError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return Pipeline(tuple(map(str, inputs)), output, tuple(steps))


def run_pipeline(
    pipeline: Pipeline,
    work: Mapping[str, Any],
    *,
    notice: Notice = quiet,
    progress: Callable[[str], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """The report of each step, as it is done. work: what of RunOptions all steps have.

    Raises what `execute` raises; the same call resumes, and does nothing where all is done.
    """
    inputs: Sequence[str] = pipeline.input
    reports: list[dict] = []
    folder = pathlib.Path(f"{pipeline.output}.steps")
    key = pipeline.fingerprint()
    if not work.get("overwrite") and not folder.exists():
        if os.path.lexists(pipeline.output):
            yield from _made_before(pipeline.output, key)
            notice(f"{pipeline.output}: already made from this input with these steps (--overwrite makes it again)")
            return
        for _, _, target in filter(lambda each: os.path.lexists(each[2]), pipeline.evidence()):
            rule = "names a run whose evidence of removals is there already, which only --overwrite replaces"
            raise DataError(problem("output", target, rule, "Add --overwrite, or choose another output"))
    with locked(folder, notice=notice):
        folder.mkdir(parents=True, exist_ok=True)
        for (command, own), output in zip(pipeline.steps, pipeline.outputs()):
            shown = progress(command.name) if progress else None
            between = {"owned": True, "overwrite": False} if output != pipeline.output else {}
            options = RunOptions(input=inputs, output=output, **dict(work) | own | between)
            try:
                callbacks = {"progress": shown} if shown else {}
                reports.append(execute(command, options, notice=notice, **callbacks))
            finally:
                if shown:
                    shown.close()
            yield reports[-1]
            inputs = [output]
        for number, source, target in pipeline.evidence():
            if os.path.exists(source):  # else a killed run has moved it
                os.replace(source, target)
            reports[number]["evidence"] = target
            reports[number]["lines"] = [line.replace(source, target) for line in reports[number].get("lines", [])]
            notice(f"{target}: evidence of what {pipeline.steps[number][0].name} has removed")
        reports[-1]["pipeline"] = key
        write_report(pipeline.output, reports)
        shutil.rmtree(folder)


def _made_before(output: str, key: str) -> list[dict[str, Any]]:
    """The reports of a pipeline that has made `output`. Raises DataError where another one, or something else, has."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        steps = json.loads(pathlib.Path(f"{output}.{REPORTS[0]}").read_text(encoding="utf-8"))["steps"]
        samples = steps[-1]["samples"]
        if steps[-1]["pipeline"] == key and all(sampled_digest(name, SAMPLES) == samples[name] for name in samples):
            return steps
    rule = "names a file made from other input or by other steps, which only --overwrite replaces"
    raise DataError(problem("output", output, rule, "Add --overwrite, or choose another output"))
