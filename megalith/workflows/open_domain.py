"""Open-domain questions: a bi-encoder, its index and files of questions in; how often the best passages answer out.

As Megatron's ICT-ZEROSHOT-NQ and RETRIEVER-EVAL (Karpukhin et al., 2020, arXiv 2004.04906, section 5.1).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.data.questions import Question
from megalith.evaluation.options import OpenDomainOptions
from megalith.evaluation.result import Metric, Result
from megalith.retrieval.embed import Embedder, build
from megalith.retrieval.recall import Recall, measure
from megalith.retrieval.search import open_index
from megalith.retrieval.sources import Passages, PassagesById, Source, open_source
from megalith.retrieval.store import Store, check_probe, is_complete


def evaluate(
    embedder: Embedder, folder: str, asked: Mapping[str, Sequence[Question]], options: OpenDomainOptions,
    notice: Callable[[str], None] = lambda line: None,
) -> dict[str, Result]:  # fmt: skip
    """The Result of each file of questions on the main process, {} on others. Every process calls it.

    folder: of the index, which is built first where it is not complete and there is evidence. Raises DataError for an
    index of another model, or of other passages than the evidence.
    """
    if options.evidence and not is_complete(folder):
        length = embedder.length(options.retriever_seq_length)
        passages = Passages(options.evidence, embedder.tokenizer, length)
        build(embedder, passages, folder, batch_size=options.indexer_batch_size, notice=notice)
    probe, size = embedder.probe(), options.indexer_batch_size
    vectors = {
        path: embedder.shared_queries([question.text for question in questions], size)
        for path, questions in asked.items()
    }
    if not embedder.runtime.mesh.is_main_process:
        return {}
    store = Store(folder)
    check_probe(store, probe, embedder.name)
    source = source_of(store, embedder, options.evidence)
    index = open_index(store, options.index_string)
    found = {}
    for path, questions in asked.items():
        scores, rows = index.search(vectors[path], options.faiss_topk_retrievals)
        recall = measure(questions, rows, lambda row: source.text(store.row(row))[1], options.faiss_match)
        found[path] = Result(
            metrics_of(recall, len(store), options), settings=settings_of(options, folder),
            examples=examples_of(questions, recall, scores, rows, lambda row: source.text(store.row(row))),
        )  # fmt: skip
    return found


def source_of(store: Store, embedder: Embedder, evidence: str | None) -> Source:
    """The texts of a store. evidence: the passages, by their ids where the store is of Megatron's pickle."""
    described = store.plan.source
    if evidence and described["kind"] == "megatron":
        return PassagesById(evidence, embedder.tokenizer, embedder.length(None))
    if evidence and described["kind"] == "blocks":
        rule = f"must not be given, as {store.folder} is of the blocks of {described['data_path']}"
        raise DataError(problem("--evidence", evidence, rule, "Leave it out, or name another --index"))
    if evidence:  # it may have moved, and must hold what was embedded
        described = {**described, "path": os.path.abspath(evidence)}
    return open_source(described, embedder.tokenizer)


def metrics_of(recall: Recall, passages: int, options: OpenDomainOptions) -> dict[str, Metric]:
    """Top-k accuracies, for each k that is asked for."""
    ks = sorted({min(k, len(recall.hits)) for k in options.retriever_report_topk_accuracies})
    what = f"of {passages} passages, by {options.faiss_match} match"
    found = {f"top-{k} accuracy": Metric(recall.at(k), f"questions answered by their {k} best {what}") for k in ks}
    return {**found, "questions": Metric(recall.questions, "questions of the file")}


def settings_of(options: OpenDomainOptions, folder: str) -> dict[str, object]:
    """What decided on the numbers."""
    search = options.index_string or "exact"
    return {
        "index": folder, "search": search, "match": options.faiss_match, "passages": options.faiss_topk_retrievals
    }  # fmt: skip


def examples_of(
    questions: Sequence[Question], recall: Recall, scores: np.ndarray, rows: np.ndarray,
    text_of: Callable[[int], tuple[str, str]],
) -> list[dict[str, object]]:  # fmt: skip
    """Of each question its best passage, and the place, from 1, of the first that holds an answer; null for none."""
    found = []
    for question, first, score, row in zip(questions, recall.first, scores[:, 0].tolist(), rows[:, 0].tolist()):
        title, text = text_of(row) if row >= 0 else ("", "")
        found.append({
            "question": question.text, "answers": list(question.answers), "answered_at": first + 1 or None,
            "score": round(score, 4), "title": title, "text": text,
        })  # fmt: skip
    return found
