"""Perplexity of text: WikiText as Megatron measures it, and any text by source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.evaluation.detokenizers import detokenize, detokenizer_of
from megalith.evaluation.options import EvaluationOptions
from megalith.evaluation.result import Metrics, Result, perplexities, window_text
from megalith.evaluation.scoring import Sample
from megalith.evaluation.task import EvaluationTask, Prepared
from megalith.evaluation.texts import FLAG, Text, read_text, read_texts
from megalith.evaluation.windows import windows


class WikiText(EvaluationTask):
    """One file as one text (Megatron's WIKITEXT103, of any WikiText file): perplexity by token and by word."""

    def __init__(self, files: Sequence[str], options: EvaluationOptions):
        if len(files) != 1:
            found = Words(f"{len(files)} files" if files else "nothing")
            raise ConfigError(problem(FLAG, found, "must be one file for wikitext103", "For several files use ppl"))
        self.options, self.text = options, read_text(files[0])
        self.notes = list[str]()
        self.detokenizer = options.detokenizer
        if self.detokenizer is None:
            if (chosen := detokenizer_of(files[0])) is None:
                rule = "must be given, because the path says none ('wiki', 'ptb' or 'lambada' in it would)"
                cure = "Write --detokenizer wikitext, or --detokenizer none for text as people write it"
                raise ConfigError(problem("--detokenizer", Words(f"{FLAG} {files[0]}"), rule, cure))
            self.detokenizer = chosen
            self.notes = [f"--detokenizer {chosen}, because of the path {files[0]}"]

    def prepare(self, tokenizer: Tokenizer, seq_length: int) -> Prepared:
        """See EvaluationTask."""
        # Megatron's count: a line's end, which WikiText has between two spaces, is a word
        words, stride = len(self.text.strip().split(" ")), self.options.stride(seq_length)
        ids = np.asarray(tokenizer.encode(detokenize(self.text, self.detokenizer)), dtype=np.int64)
        if len(ids) < 2:
            raise DataError(problem(FLAG, Words("one token"), "must hold at least two tokens", "Name a longer text"))
        samples = list(windows(ids, seq_length, stride))

        def conclude(scores: np.ndarray) -> Result:
            split = "the text before detokenization, split at each space"
            size = len(self.text.encode("utf-8"))
            how = window_text(seq_length, stride, self.detokenizer)
            metrics = perplexities(scores[:, 0].sum(), len(ids) - 1, words - 1, size, split, how)
            return Result(metrics, examples=examples(samples, scores, stride), notes=notes, settings=settings)

        notes = [*self.notes, *window_notes(len(ids), samples, seq_length, stride)]
        settings = {"seq_length": seq_length, "overlapping_eval": stride, "detokenizer": self.detokenizer}
        return Prepared(samples, conclude)


class Perplexity(EvaluationTask):
    """Texts of any files, each read by itself: perplexity of all, and of each source where there are several."""

    def __init__(self, files: Sequence[str], options: EvaluationOptions):
        if not files:
            raise ConfigError(problem(FLAG, Words("nothing"), "must name the text to evaluate", f"Add {FLAG} FILE"))
        self.options = options
        self.texts = [text for file in files for text in read_texts(file, options.json_key, options.source_key)]

    def prepare(self, tokenizer: Tokenizer, seq_length: int) -> Prepared:
        """See EvaluationTask."""
        stride = self.options.stride(seq_length)
        has_begin = len(tokenizer.encode("")) > 0  # the tokenizer puts a token before every text (Llama's BOS)
        begins = self.options.add_bos or has_begin
        rows = self.tokenize(tokenizer, begins and not has_begin)
        samples = list[Sample]()
        owners = list[int]()  # the text of each sample
        for number, ids in enumerate(rows):
            found = list(windows(ids, seq_length, stride)) if len(ids) > 1 else []
            samples += found
            owners += [number] * len(found)
        notes = window_notes(sum(map(len, rows)), samples, seq_length, stride)
        if empty := [text.where for text, ids in zip(self.texts, rows) if len(ids) < 2]:
            notes.append(f"{len(empty)} texts of one token count nothing, first {empty[0]}; --add-bos counts them")
        if not samples:
            raise DataError(problem(FLAG, Words("texts of one token"), "must hold longer texts", "Add --add-bos"))

        def conclude(scores: np.ndarray) -> Result:
            losses = np.bincount(owners, scores[:, 0], len(rows))
            tokens = np.bincount(owners, [sample.scored for sample in samples], len(rows)).astype(int)
            names = list(dict.fromkeys(text.source for text in self.texts))
            how = window_text(seq_length, stride, self.options.detokenizer)
            chosen = {name: [n for n, text in enumerate(self.texts) if text.source == name] for name in names}
            sources = {name: self.metrics(numbers, losses, tokens, begins, how) for name, numbers in chosen.items()}
            return Result(
                self.metrics(range(len(rows)), losses, tokens, begins, how), sources if len(sources) > 1 else {},
                [
                    {"text": text.where, "source": text.source, "tokens": int(count), "loss": float(loss)}
                    for text, count, loss in zip(self.texts, tokens, losses)
                ],
                notes, {"seq_length": seq_length, "overlapping_eval": stride},
            )  # fmt: skip

        return Prepared(samples, conclude)

    def tokenize(self, tokenizer: Tokenizer, add_begin: bool) -> list[np.ndarray]:
        """The tokens of each text. add_begin: with the end-of-document token before each."""
        begin = [tokenizer.require("eod")] if add_begin else []
        texts = [detokenize(text.text, self.options.detokenizer or "none") for text in self.texts]
        return [np.asarray([*begin, *ids], dtype=np.int64) for ids in tokenizer.encode_batch(texts)]

    def metrics(
        self, numbers: Sequence[int], losses: np.ndarray, tokens: np.ndarray, begins: bool, how: str
    ) -> Metrics:
        """Those of the texts of these numbers; none where no token of them is predicted.

        begins: whether a token stands before each text, so that its first word is predicted too. how: see perplexities.
        """
        counted = [number for number in numbers if tokens[number]]
        texts: list[Text] = [self.texts[number] for number in counted]
        if not texts:
            return {}
        words = sum(len(text.text.split()) - (not begins) for text in texts)
        size = sum(len(text.text.encode("utf-8")) for text in texts)
        loss, count = float(losses[counted].sum()), int(tokens[counted].sum())
        return perplexities(loss, count, words, size, "split at white space", how)


def window_notes(tokens: int, samples: Sequence[Sample], seq_length: int, stride: int) -> list[str]:
    """How the text was cut, and what the overlap costs, where it does."""
    read = sum(len(sample.ids) for sample in samples)
    text = f"{len(samples)} windows of at most {seq_length} tokens, {stride} apart"
    if read >= 2 * tokens:
        text += f": each token is read {read / tokens:.0f} times; --overlapping-eval {seq_length} reads it once, with "
        text += "less before it"
    return [text]


def examples(samples: Sequence[Sample], scores: np.ndarray, stride: int) -> list[dict]:
    """What is known of each window."""
    return [
        {"window": number, "first token": number * stride, "tokens": sample.scored, "loss": float(loss)}
        for number, (sample, (loss, _)) in enumerate(zip(samples, scores))
    ]
