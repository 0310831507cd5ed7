"""How much of a sample is masked, and what that asks of the lengths: known before any data is read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalith.common.errors import problem
from megalith.config.flags.text import Problem, trouble
from megalith.config.run import RunConfig

KEPT = {"bert": 3, "t5": 2}  # tokens of --seq-length that are not text: [CLS], [SEP], [SEP]; Megatron keeps two for T5
USUAL_RUN = sum(0.8**words for words in range(10))  # words that T5 masks at a time: drawn with p = 0.2, at most 10


def masked_tokens(dataset: str, seq_length: int, share: float) -> int:
    """The most tokens that are masked of a sample, as data/samples/masking.py counts them."""
    text = seq_length - KEPT[dataset]
    return max(0, int(min(share * text, max(1, round(share * text)))))


def usual_runs(masked: int) -> int:
    """Runs that a T5 sample with so many masked tokens usually has, and so sentinels that it takes; the most is one for each token."""
    return math.ceil(masked / USUAL_RUN)


def decoder_problem(seq_length: int, decoder_seq_length: int, share: float) -> str | None:
    """Why T5's decoder is too short for a usual sample of whole length; None where it is not."""
    masked = masked_tokens("t5", seq_length, share)
    usual, most = masked + usual_runs(masked) + 1, 2 * masked + 1
    if decoder_seq_length >= usual:
        return None
    rule = (
        f"of {seq_length - KEPT['t5']} tokens up to {masked} are masked, which with sentinels and the end are usually {usual}, "
        f"at most {most}"
    )
    return problem(
        "--decoder-seq-length", decoder_seq_length, rule, f"Write {most}, or at least {usual}, or lower --mask-prob"
    )


def masking_problems(config: RunConfig) -> Iterator[Problem]:
    """Lengths with which nothing can be masked, or what is masked cannot be spelled."""
    d, sequence = config.data, config.data.seq_length
    if d.dataset not in KEPT or sequence is None:
        return
    if not masked_tokens(d.dataset, sequence, d.mask_prob):
        rule = f"of the {max(0, sequence - KEPT[d.dataset])} tokens of text in a sample it is less than one, so nothing is ever masked"
        cure = "Raise it (the usual share is 0.15), or --seq-length"
        yield trouble(("mask_prob", "seq_length"), "--mask-prob", d.mask_prob, rule, cure)
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
            f"--decoder-seq-length {length} fits usual samples; one with more to spell (at most {2 * masked + 1}) is masked less"
        )
    if 0 < d.vocab_extra_ids < masked:
        lines.append(
            f"--vocab-extra-ids {d.vocab_extra_ids} fits usual samples; one with more runs (at most {masked}) is masked less"
        )
    return lines
