"""LAMBADA (Paperno et al., 2016, arXiv 1606.06031): does the model know the last word of a passage.

As in Megatron's tasks/zeroshot_gpt: the last token (as GPT-2 was measured), or with --strict-lambada the whole last
word. An answer is right where each of its tokens is the likeliest after the right ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.evaluation.detokenizers import detokenize
from megalith.evaluation.options import EvaluationOptions
from megalith.evaluation.result import Metric, Result, bounded_exp
from megalith.evaluation.scoring import Sample
from megalith.evaluation.task import EvaluationTask, Prepared
from megalith.evaluation.texts import FLAG, read_json_lines


class Lambada(EvaluationTask):
    """JSON lines of passages."""

    def __init__(self, files: Sequence[str], options: EvaluationOptions):
        if len(files) != 1:
            found = Words(f"{len(files)} files" if files else "nothing")
            raise ConfigError(problem(FLAG, found, "must be one file for lambada", "Name a file of JSON lines"))
        self.options, self.texts = options, read_json_lines(files[0])
        for text in self.texts:
            if len(text.text.split()) < 2:
                rule, cure = "must have a word before its last one", "Correct the line, or leave it out"
                raise DataError(problem(text.where, text.text[:60], rule, cure))

    def prepare(self, tokenizer: Tokenizer, seq_length: int) -> Prepared:
        """See EvaluationTask. What is longer than seq_length is cut off at its beginning."""
        detokenizer = self.options.detokenizer or "none"
        pairs = [self.tokenize(detokenize(text.text, detokenizer), tokenizer) for text in self.texts]
        if (longest := max(len(answer) for _, answer in pairs)) > seq_length:
            rule = f"must be at least {longest}, the tokens of the longest answer"
            raise ConfigError(problem("--seq-length", seq_length, rule, f"Give {longest} or more"))
        samples = [Sample([*context, *answer][-seq_length - 1 :], len(answer)) for context, answer in pairs]
        cut = [len(context) + len(answer) > seq_length + 1 for context, answer in pairs]
        notes = []
        if any(cut):
            notes.append(
                f"{sum(cut)} of {len(cut)} passages are longer than {seq_length} tokens and were cut off at the left, "
                f"first {self.texts[cut.index(True)].where}"
            )

        how = f", passages cut to {seq_length} tokens" if any(cut) else ""
        how += "" if detokenizer == "none" else f", detokenizer {detokenizer}"

        def conclude(scores: np.ndarray) -> Result:
            right = scores[:, 1] == [sample.scored for sample in samples]
            rows = zip(self.texts, pairs, cut, scores, right)
            settings = {"seq_length": seq_length}
            return Result(self.metrics(scores, right, how), notes=notes, settings=settings, examples=[
                {"text": text.where, "answer": tokenizer.decode(answer), "answer_ids": list(map(int, answer)),
                 "right": bool(is_right), "right_tokens": int(hits), "loss": float(loss), "cut_off": was_cut}
                for text, (_, answer), was_cut, (loss, hits), is_right in rows
            ])  # fmt: skip

        return Prepared(samples, conclude)

    def tokenize(self, text: str, tokenizer: Tokenizer) -> tuple[Sequence[int], Sequence[int]]:
        """The tokens of a passage before its answer, and those of the answer."""
        if not self.options.strict_lambada:
            ids = tokenizer.encode(text)
            return ids[:-1], ids[-1:]
        word = text.split()[-1]
        context = text[: text.rindex(word)].strip()
        # Tokenized together: SentencePiece would begin a word alone with a space of its own.
        ids, length = tokenizer.encode(f"{context} {word}"), len(tokenizer.encode(context))
        return ids[:length], ids[length:]

    def metrics(self, scores: np.ndarray, right: np.ndarray, how: str) -> dict[str, Metric]:
        """Accuracy, and how likely the answers are. how: what else numbers depend on, for their definitions."""
        what = "last word" if self.options.strict_lambada else "last token"
        loss = float(scores[:, 0].mean())
        return {
            "accuracy": Metric(float(right.mean()), f"right answers / passages; an answer is the {what}{how}"),
            "right answers": Metric(int(right.sum()), f"every token of the answer is the model's likeliest{how}"),
            "passages": Metric(len(right), "lines of the file"),
            "answer loss": Metric(loss, f"mean over passages of the loss of the {what}, in nats{how}"),
            "answer perplexity": Metric(bounded_exp(loss), f"exp(min(20, answer loss)){how}"),
        }
