"""The section `retriever`: how a bi-encoder learns to find passages. Names are Megatron's."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class RetrieverConfig:
    """What the loss of a bi-encoder compares, what it begins with, and which passages a question comes with."""

    bert_load: str | None = option(
        None, "ict, nq: a BERT in any format that --load takes, with whose weights both towers begin"
    )
    retriever_score_scaling: bool = option(False, "ict, nq: divide scores by the square root of --hidden-size")
    retriever_report_topk_accuracies: list[int] = option(
        [1, 5], "ict, nq: report how often a query's own context is among the k best, for each of these k"
    )
    retriever_mask_same_document: bool = option(
        False, "ict, nq: other contexts of a query's own document are no negatives for it (in Megatron they are)"
    )
    retriever_chunk_queries: int = option(1024, "ict, nq: queries whose scores exist at one time", minimum=1)
    retriever_seq_length: int | None = option(
        None, "nq: tokens of a question and of a passage, in the place of --seq-length", minimum=1
    )
    train_with_neg: bool = option(False, "nq: train with --train-hard-neg passages that do not answer the question")
    train_hard_neg: int = option(
        0, "nq: hard negatives of a question; what the file lacks of them are other negatives", minimum=0
    )
    val_av_rank_hard_neg: int = option(30, "nq: hard negatives of a question in validation", minimum=0)
    val_av_rank_other_neg: int = option(30, "nq: other negatives of a question in validation", minimum=0)
