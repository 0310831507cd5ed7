"""Samples of passage retrieval: a question, a passage with its answer, and passages without (DPR's JSON)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.questions import Passage, Question, read_questions
from megalith.data.samples.dataset_factory import FilesFactory
from megalith.data.samples.epochs import epoch_order
from megalith.data.samples.sentence_dataset import padded
from megalith.data.tasks.dataset import names_of


class PassageDataset:
    """Samples are dicts over s = seq_length tokens and c = 1 + hard + other contexts:

    query_ids [s] int64, [CLS] question [SEP]; context_ids [c, s] int64, [CLS] title [SEP] passage [SEP], first one that
    holds an answer, then hard negatives, then other ones; query_padding_mask, context_padding_mask; context_mask [c]
    int64, 0 where a question has fewer; document [c] int64, equal for equal passages, so that
    --retriever-mask-same-document hides a passage that is right from other questions' negatives too; loss_mask float32,
    1. (Karpukhin et al., 2020, section 3.2; flags --train-with-neg, --train-hard-neg, --val-av-rank-hard-neg and
    --val-av-rank-other-neg of Megatron's RET-FINETUNE-NQ.)

    With `draw`, as in training, sample i of a run (of all epochs, one after the other) draws its passages from
    random.Random(seed + i), whatever the workers; without, it takes the first ones.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: Any, *, seq_length: int, hard: int = 0, other: int = 0,
        draw: bool = False, seed: int = 1234, files: Sequence[str] = (),
    ):  # fmt: skip
        """hard, other: negatives of each question that a search found, and that are random.

        draw: of a question with fewer hard negatives other ones take their places, as in Megatron. files: where the
        questions are from. Questions without a passage that holds an answer are left out, and counted in `left_out`.
        Raises DataError where none is left.
        """
        if seq_length < 4:
            rule = "must be at least 4 tokens: [CLS] title [SEP] passage"
            raise ConfigError(problem("--seq-length", seq_length, rule, "Write --seq-length 256"))
        self.questions = [question for question in questions if question.positives]
        self.left_out = len(questions) - len(self.questions)
        if not self.questions:
            rule = "must have questions with positive_ctxs (DPR's JSON)"
            what = ", ".join(files) or "The questions"
            raise DataError(problem(what, Words("none"), rule, "Name a file such as DPR's biencoder-nq-train.json"))
        self.tokenizer, self.seq_length, self.seed, self.draw = tokenizer, seq_length, seed, draw
        self.hard, self.other, self.files = hard, other, list(files)
        self.cls, self.sep, self.pad = (tokenizer.require(name) for name in ("cls", "sep", "pad"))

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The sample of question `index` in the first epoch, as the class describes."""
        return self._sample(index, 0)

    def in_epoch(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of an epoch: questions are shuffled, and their passages drawn, anew in each."""
        return self._sample(int(epoch_order(self.seed, epoch, len(self))[index]), epoch)

    def _sample(self, number: int, epoch: int) -> dict[str, np.ndarray]:
        question = self.questions[number]
        passages = self._passages(question, random.Random(self.seed + epoch * len(self) + number))
        contexts = [self._passage(passage) for passage in passages]
        query = [self.cls, *self.tokenizer.encode(question.text)[: self.seq_length - 2], self.sep]
        there = np.array([passage is not None for passage in passages], np.int64)
        documents = [
            0 if passage is None else zlib.crc32(f"{passage.title}\0{passage.text}".encode()) for passage in passages
        ]
        return {
            "query_ids": padded(query, self.seq_length, self.pad),
            "query_padding_mask": padded([1] * len(query), self.seq_length, 0),
            "context_ids": np.stack([padded(tokens, self.seq_length, self.pad) for tokens in contexts]),
            "context_padding_mask": np.stack([padded([1] * len(tokens), self.seq_length, 0) for tokens in contexts]),
            "context_mask": there,
            "document": np.array(documents, np.int64),
            "loss_mask": np.array(1.0, np.float32),
        }

    def _passages(self, question: Question, draws: random.Random) -> list[Passage | None]:
        """The right passage, then hard negatives, then other ones; None where there are too few."""
        right: list[Passage | None] = list(question.positives)
        hard: list[Passage | None] = list(question.hard_negatives)
        other: list[Passage | None] = list(question.negatives)
        if self.draw:
            for each in (right, hard, other):
                draws.shuffle(each)
            missing = max(0, self.hard - len(hard))
            hard, other = hard + other[:missing], other[missing:]
        absent: list[Passage | None] = [None] * (self.hard + self.other)
        return [right[0], *(hard + absent)[: self.hard], *(other + absent)[: self.other]]

    def describe(self, name: str) -> list[str]:
        """A line for the user: how many questions, and what was left out."""
        line = f"{name}: {len(self)} questions, each with {self.hard} hard and {self.other} other negatives of its own"
        if self.left_out:
            line += f"; left out, as no passage of theirs holds an answer: {self.left_out}"
        return [line]

    def _passage(self, passage: Passage | None) -> list[int]:
        if passage is None:
            return [self.cls, self.sep]
        title, text = self.tokenizer.encode(passage.title), self.tokenizer.encode(passage.text)
        return [*[self.cls, *title, self.sep, *text][: self.seq_length - 1], self.sep]


def open_files(config: RunConfig, tokenizer: Any) -> tuple[PassageDataset | None, dict[str, PassageDataset]]:
    """The dataset of --train-data, None where nothing is trained, and one for each path of --valid-data by name."""
    f, r = config.finetuning, config.retriever

    def dataset(files: Sequence[str], **options: Any) -> PassageDataset:
        questions = [question for file in files for question in read_questions(file)]
        return PassageDataset(questions, tokenizer, seq_length=config.data.seq_length or 0, files=files, **options)

    train = None
    if not config.validation.skip_train:
        train = dataset(f.train_data, hard=r.train_hard_neg, draw=True, seed=config.batch.seed)
    negatives = {"hard": r.val_av_rank_hard_neg, "other": r.val_av_rank_other_neg}
    return train, {name: dataset([path], **negatives) for name, path in zip(names_of(f.valid_data), f.valid_data)}


from_files = FilesFactory(open_files)
