"""How much of a sample is masked, and which lengths that needs: known before any data is read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalith.common.errors import problem
from megalith.config.flags.text import Problem, field_problem
from megalith.config.run import RunConfig

# Tokens of --seq-length that are not text: [CLS], [SEP], [SEP]; for T5 Megatron keeps two.
SPECIAL_TOKENS = {"bert": 3, "t5": 2}
MEAN_SPAN = sum(0.8**words for words in range(10))  # words that T5 masks at a time: drawn with p = 0.2, at most 10


def masked_tokens(dataset: str, seq_length: int, mask_prob: float) -> int:
    """The most tokens that are masked of a sample, as data/samples/masking.py counts them."""
    text = seq_length - SPECIAL_TOKENS[dataset]
    return max(0, int(min(mask_prob * text, max(1, round(mask_prob * text)))))


def expected_spans(masked: int) -> int:
    """Spans, and so sentinels, of a usual T5 sample with so many masked tokens; the most is one for each token."""
    return math.ceil(masked / MEAN_SPAN)


def decoder_problem(seq_length: int, decoder_seq_length: int, mask_prob: float) -> str | None:
    """Why T5's decoder is too short for a usual sample of full length; None where it is not."""
    masked = masked_tokens("t5", seq_length, mask_prob)
    usual, most = masked + expected_spans(masked) + 1, 2 * masked + 1
    if decoder_seq_length >= usual:
        return None
    text = seq_length - SPECIAL_TOKENS["t5"]
    rule = (
        f"must be at least {usual}: of {text} tokens up to {masked} are masked, which with sentinels and the end "
        f"are usually {usual}, at most {most}"
    )
    cure = f"Write {most}, or at least {usual}, or lower --mask-prob"
    return problem("--decoder-seq-length", decoder_seq_length, rule, cure)


def masking_problems(config: RunConfig) -> Iterator[Problem]:
    """Lengths with which nothing can be masked, or with which the decoder cannot hold what is masked."""
    d, sequence = config.data, config.data.seq_length
    if d.dataset not in SPECIAL_TOKENS or sequence is None:
        return
    if not masked_tokens(d.dataset, sequence, d.mask_prob):
        tokens = max(0, sequence - SPECIAL_TOKENS[d.dataset])
        rule = f"must mask at least one of the {tokens} tokens of text in a sample"
        cure = "Raise it (the usual value is 0.15), or --seq-length"
        yield field_problem(("mask_prob", "seq_length"), "--mask-prob", d.mask_prob, rule, cure)
    elif d.dataset == "t5" and (text := decoder_problem(sequence, d.decoder_seq_length or sequence, d.mask_prob)):
        yield Problem(("decoder_seq_length", "seq_length", "mask_prob"), text)


def masking_notices(config: RunConfig) -> list[str]:
    """What rare samples will lose, where lengths fit usual ones."""
    d = config.data
    if d.dataset != "t5" or d.seq_length is None:
        return []
    masked, length = masked_tokens("t5", d.seq_length, d.mask_prob), d.decoder_seq_length or d.seq_length
    lines = []
    if length < 2 * masked + 1:
        lines.append(
            f"--decoder-seq-length {length} fits usual samples; one that needs more tokens (at most {2 * masked + 1}) "
            "is masked less"
        )
    if 0 < d.vocab_extra_ids < masked:
        lines.append(
            f"--vocab-extra-ids {d.vocab_extra_ids} fits usual samples; one with more spans (at most {masked}) "
            "is masked less"
        )
    return lines
