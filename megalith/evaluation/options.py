"""The tasks of an evaluation and its options, each with its help: `megalith evaluate` has a flag for each. No torch.

Names of options are those of Megatron's tasks/main.py where it has the option.
"""

from __future__ import annotations

import dataclasses

from megalith.common.errors import ConfigError, problem
from megalith.common.registry import Registry
from megalith.config.flags.text import check_minimum
from megalith.config.options import option

TASKS = Registry(  # an EvaluationTask each (evaluation/task.py)
    "evaluation task",
    {
        "wikitext103": "megalith.evaluation.perplexity:WikiText",
        "lambada": "megalith.evaluation.lambada:Lambada",
        "ppl": "megalith.evaluation.perplexity:Perplexity",
    },
)
# Of a bi-encoder and its index (workflows/open_domain.py), by what Megatron calls it too
OPEN_DOMAIN = ("nq", "ict-zeroshot-nq", "retriever-eval")
OVERLAPPING_EVAL = 32  # Megatron's default
DETOKENIZERS = ("wikitext", "ptb", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is read and how it is cut into windows. Raises ConfigError for what cannot work."""

    seq_length: int | None = option(None, "most tokens that the model reads at a time (default: all it can)", minimum=1)
    overlapping_eval: int | None = option(
        None,
        f"tokens from one window to the next (default: {OVERLAPPING_EVAL}, at most --seq-length, which is no overlap)",
        minimum=1,
    )
    micro_batch_size: int = option(8, "windows or texts that a process reads at a time", minimum=1)
    detokenizer: str | None = option(
        None, "undoes the tokenization of a data set, as Megatron does: wikitext, ptb or none", choices=DETOKENIZERS
    )
    strict_lambada: bool = option(False, "LAMBADA: the last word must be right, not its last token alone")
    json_key: str = option("text", "ppl: the field of a JSON line that holds the text")
    source_key: str | None = option(None, "ppl: the field of a JSON line that names its source (default: the file)")
    add_bos: bool = option(False, "ppl: begin each text with the end-of-document token, so that its first token counts")

    def __post_init__(self):
        for each in dataclasses.fields(self):
            check_minimum(each.name, getattr(self, each.name), each.metadata["minimum"])
        if self.detokenizer is not None and self.detokenizer not in DETOKENIZERS:
            rule = f"must be one of {', '.join(DETOKENIZERS)}"
            raise ConfigError(problem("--detokenizer", self.detokenizer, rule, "Write --detokenizer none"))

    def stride(self, seq_length: int) -> int:
        """Tokens from one window of `seq_length` to the next. Raises ConfigError where windows would leave gaps."""
        if self.overlapping_eval is None:
            return min(OVERLAPPING_EVAL, seq_length)
        if self.overlapping_eval > seq_length:
            rule = f"must be at most {seq_length}, the length of a window, or tokens between two would not be counted"
            raise ConfigError(problem("--overlapping-eval", self.overlapping_eval, rule, f"Give {seq_length} or less"))
        return self.overlapping_eval


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenDomainOptions:
    """What answers open-domain questions, and what counts as an answer. Raises ConfigError for what cannot work."""

    index: str | None = option(None, "the folder that megalith index build wrote", flags=("--embedding-path",))
    evidence: str | None = option(
        None, "the passages, TSV (id, text, title) or JSON lines: an index that is not there is built of them",
        flags=("--evidence-data-path",),
    )  # fmt: skip
    index_string: str | None = option(None, "search this index of FAISS (default: exactly)")
    faiss_match: str = option(
        "string", "an answer is words of the passage, or with regex a regular expression", choices=("string", "regex")
    )
    faiss_topk_retrievals: int = option(100, "passages of each question", minimum=1)
    faiss_use_gpu: bool = option(False, "accepted: exact search is on the CPU's cores")
    retriever_report_topk_accuracies: tuple[int, ...] = option((1, 5, 20, 100), "report these, as far as passages go")
    retriever_seq_length: int | None = option(None, "tokens of a passage (default: as in training)", minimum=1)
    indexer_batch_size: int = option(128, "passages or questions that are embedded at a time", minimum=1)

    def __post_init__(self):
        for name in ("faiss_topk_retrievals", "retriever_seq_length", "indexer_batch_size"):
            check_minimum(name, getattr(self, name), 1)
        if self.faiss_match not in ("string", "regex"):
            rule = "must be string or regex"
            raise ConfigError(problem("--faiss-match", self.faiss_match, rule, "Write --faiss-match string"))
        if not self.retriever_report_topk_accuracies or min(self.retriever_report_topk_accuracies) < 1:
            found, rule = self.retriever_report_topk_accuracies, "must be whole numbers above 0"
            raise ConfigError(problem("--retriever-report-topk-accuracies", found, rule, "Write 1 5 20 100"))
