"""Samples of passage retrieval: a question, a passage with its answer, and passages without (DPR's JSON)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.data.questions import Passage, Question
from megalith.data.samples.sentence_dataset import padded


class PassageDataset:
    """Samples are dicts over s = seq_length tokens and c = 1 + hard + other contexts:

    query_ids [s] int64, [CLS] question [SEP]; context_ids [c, s] int64, [CLS] title [SEP] passage [SEP], first one that
    holds an answer, then hard negatives, then other ones; query_padding_mask, context_padding_mask; context_mask [c]
    int64, 0 where a question has fewer; document [c] int64, equal for equal passages, so that
    --retriever-mask-same-document hides a passage that is right from other questions' negatives too; loss_mask float32,
    1. (Karpukhin et al., 2020, section 3.2; flags --train-with-neg, --train-hard-neg, --val-av-rank-hard-neg and
    --val-av-rank-other-neg of Megatron's RET-FINETUNE-NQ.)

    Sample i draws from random.Random(seed + i) where `shuffle`, whatever the workers; else it takes the first ones.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: Any, *, seq_length: int, hard: int = 0, other: int = 0,
        shuffle: bool = False, seed: int = 1234,
    ):  # fmt: skip
        """hard, other: negatives of each question that a search found, and that are random.

        Questions without a passage that holds an answer are left out, and counted in `left_out`. Raises DataError where
        none is left.
        """
        if seq_length < 4:
            rule = "must be at least 4 tokens: [CLS] title [SEP] passage"
            raise ConfigError(problem("--seq-length", seq_length, rule, "Write --seq-length 256"))
        self.questions = [question for question in questions if question.positives]
        self.left_out = len(questions) - len(self.questions)
        if not self.questions:
            rule = "must have questions with positive_ctxs (DPR's JSON)"
            raise DataError(problem("The training data", Words("none"), rule, "Name DPR's biencoder-nq-train.json"))
        self.tokenizer, self.seq_length, self.seed, self.shuffle = tokenizer, seq_length, seed, shuffle
        self.hard, self.other = hard, other
        self.cls, self.sep, self.pad = (tokenizer.require(name) for name in ("cls", "sep", "pad"))

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        question, draw = self.questions[index], random.Random(self.seed + index)
        passages: list[Passage | None] = [draw.choice(question.positives) if self.shuffle else question.positives[0]]
        for found, count in ((question.hard_negatives, self.hard), (question.negatives, self.other)):
            chosen: list[Passage | None] = list(found)
            if self.shuffle:
                draw.shuffle(chosen)
            passages += (chosen + [None] * count)[:count]
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

    def _passage(self, passage: Passage | None) -> list[int]:
        if passage is None:
            return [self.cls, self.sep]
        title, text = self.tokenizer.encode(passage.title), self.tokenizer.encode(passage.text)
        return [*[self.cls, *title, self.sep, *text][: self.seq_length - 1], self.sep]
