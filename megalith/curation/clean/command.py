"""`megalith data clean`: rules over documents, every drop and every change counted by rule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.curation.clean import language as languages
from megalith.curation.clean.bad_words import word_pattern
from megalith.curation.clean.rules import Rule, Text, build_rule, expand
from megalith.curation.documents import Document
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Command, Run
from megalith.curation.settings import DEFAULT_RULES, CleanSettings
from megalith.curation.tokens import token_counter, tokenizer_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clean(CleanSettings, Command):
    """The step `megalith data clean`."""

    name = "clean"
    drops = True

    @property
    def chosen(self) -> list[str]:
        """The names of the rules, groups expanded."""
        if not self.rules:
            return [
                *DEFAULT_RULES,
                *(["language"] if self.language else []),
                *(["bad_words"] if self.bad_words else []),
            ]
        return expand(self.rules)

    def check(self) -> None:
        """Raise ConfigError that lists all mistakes."""
        chosen, problems = self.chosen, []
        for rule, flag, given in (
            ("language", "--language", self.language),
            ("bad_words", "--bad-words", self.bad_words),
            ("min_tokens", "--tokenizer-type", self.tokenizer),
            ("max_tokens", "--tokenizer-type", self.tokenizer),
        ):
            if rule in chosen and not given:
                problems.append(problem(flag, None, f"must be given for the rule {rule}", f"Add {flag}"))
        for rule, value in (("language", self.language), ("bad_words", self.bad_words)):
            if value and rule not in chosen:
                what = f"--{rule.replace('_', '-')}"
                problems.append(problem(what, value, f"is used by the rule {rule} alone", f"Add {rule} to --rules"))
        if not problems and self.language and self.language not in (known := languages.languages()):
            rule = f"must be one of {' '.join(known)}"
            problems.append(problem("--language", self.language, rule, "Give the code of a language"))
        if problems:
            raise ConfigError("\n".join(problems))

    def files(self, output: str) -> Iterable[str]:
        """Those of the tokenizer, and the list of bad words."""
        return [*tokenizer_files(self.tokenizer), *([self.bad_words] if self.bad_words else [])]

    def run(self, run: Run) -> dict[str, Any]:
        """One pass."""
        done = run.step_pass(CleanStep(self), "clean", final=True)
        run.assemble_documents(done)
        return {"rules": run.rules(done)}


@dataclasses.dataclass
class CleanStep(Step):
    """The rules over each document."""

    settings: Clean
    name = "clean"

    def load(self) -> None:
        """Build the rules."""
        tokenizer = self.settings.tokenizer
        self.count_tokens = token_counter(tokenizer) if tokenizer else None
        self.rules = [self._rule(name) for name in self.settings.chosen]

    def _rule(self, name: str) -> Rule:
        settings = self.settings
        match name:
            case "language":
                return Rule(
                    name, test=functools.partial(_other_language, settings.language, settings.min_language_score)
                )
            case "min_characters":
                return Rule(
                    name, test=_limits(lambda text: len(text.text), settings.min_characters, None, "characters")
                )
            case "max_characters":
                return Rule(
                    name, test=_limits(lambda text: len(text.text), None, settings.max_characters, "characters")
                )
            case "min_tokens":
                return Rule(name, test=_limits(lambda text: text.length, settings.min_tokens, None, "tokens"))
            case "max_tokens":
                return Rule(name, test=_limits(lambda text: text.length, None, settings.max_tokens, "tokens"))
            case "bad_words":
                return Rule(name, test=bad_words_test(settings.bad_words))
        return build_rule(name)

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Apply the rules to each document."""
        for document in documents:
            self.apply(document, out)

    def apply(self, document: Document, out: PartOutput) -> None:
        """Apply the rules in order, to the first test that drops the document."""
        text = Text(document.text, self.count_tokens)
        for rule in self.rules:
            if rule.correct:
                corrected = rule.correct(text.text)
                if corrected != text.text:
                    if not corrected.strip():
                        out.drop(document, rule.name, "nothing is left")
                        return
                    out.note(document, rule.name, "", text.text, corrected)
                    text = Text(corrected, self.count_tokens)
            elif found := rule.test(text):  # type: ignore[misc]
                out.drop(document, rule.name, found)
                return
        out.keep(document.with_text(text.text))


def _other_language(wanted: str, least: float, text: Text) -> str:
    found, score = languages.identify(text.text)
    return "" if found == wanted and score >= least else f"{found} ({score:.2f})"


def _limits(count: Callable[[Text], int], least: int | None, most: int | None, unit: str) -> Callable[[Text], str]:
    def test(text: Text) -> str:
        number = count(text)
        outside = (least is not None and number < least) or (most is not None and number > most)
        return f"{number} {unit}" if outside else ""

    return test


def bad_words_test(path: str) -> Callable[[Text], str]:
    """A test for the words of a file as whole words, without case."""
    pattern = word_pattern(path, "--bad-words")

    def test(text: Text) -> str:
        found = pattern.search(text.text)
        return f"the word {found[0]!r}" if found else ""

    return test
