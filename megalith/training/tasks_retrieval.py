"""Losses of bi-encoders: of all contexts of the global batch, which one belongs to a query?

Lee et al., 2019 (arXiv 1906.00300), section 4: the inverse cloze task with in-batch negatives. Karpukhin et al., 2020
(arXiv 2004.04906), section 3.2: the same with further contexts of each query that are known to be wrong.
Shapes: B queries of the global batch, C contexts (B of them, or several for each query), p width of a vector.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalith.config.run import RunConfig
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.runtime.build import Mesh
from megalith.training.tasks import Batch, MetricSums, PooledTask
from megalith.training.tasks_classification import first_token_is_here


class InverseCloze(PooledTask):
    """Cross entropy of each query's own context among the contexts of all queries of the global batch.

    Batches have `query_ids` [b, s], `context_ids` [b, t], or [b, c, t] with the own context first and c - 1 that are
    known to be wrong, their padding masks, and may have `document` [b] or [b, c], equal for contexts of one document,
    and `context_mask` [b, c], 0 where a query has no such context, and `loss_mask` [b], 0 for samples that only fill a
    batch: they are no queries, and their contexts no candidates. Reports top-k accuracies: how often the own context
    is among the k best. A context of equal score counts as better, so that equal vectors earn nothing.
    """

    loss_name = "ict loss"
    sequences: Mapping[str, str] = MappingProxyType(
        {"query_ids": "coordinates", "context_ids": "context_coordinates"}
    )  # fmt: skip

    def setup(self, config: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None) -> None:
        """Read the section `retriever`."""
        options = config.retriever
        self.scale = (config.model.hidden_size or 1) ** -0.5 if options.retriever_score_scaling else 1.0
        self.top = tuple(sorted(set(options.retriever_report_topk_accuracies)))
        self.mask_same_document, self.chunk = options.retriever_mask_same_document, options.retriever_chunk_queries
        self.top_names = [f"top{k}_acc" for k in self.top]
        self.metric_names = [*self.top_names]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Queries, each counted on the process that has its first token."""
        return {self.loss_name: counted(batch).sum() * first_token_is_here(batch)}

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Queries are the model's `inputs`."""
        names = ("context_ids", "context_padding_mask")
        passed: Batch = {name: batch[name] for name in names if name in batch}
        if "query_padding_mask" in batch:
            passed["padding_mask"] = batch["query_padding_mask"]
        return {"inputs": batch["query_ids"], **passed}

    def pooled(self, output: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The vectors [b, p] and [b, c, p]; with what is no vector, [b, c]: documents, and which contexts there are."""
        here = first_token_is_here(batch)
        queries, contexts = output
        shape = batch["context_ids"].shape[:-1]
        found = {"queries": queries * here, "contexts": contexts.view(shape[0], -1, contexts.shape[-1]) * here}
        for name in ("document", "context_mask"):
            if name in batch:
                found[name] = batch[name].view(shape[0], -1).long()
        if "loss_mask" in batch:
            there = found.get("context_mask", torch.ones_like(found["contexts"][..., 0], dtype=torch.long))
            found["context_mask"] = there * batch["loss_mask"].long()[:, None]
            found["counted"] = batch["loss_mask"].long()
        return found

    def losses(self, output: dict[str, Tensor], batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross entropies, a chunk of queries at a time: their scores exist once, and are computed again for the
        gradient.
        """
        queries, contexts = vectors(output)
        total = queries.new_zeros(())
        for rows in self.chunks(output):
            chunk = functools.partial(self.loss_of, output, rows)
            total = total + checkpoint(chunk, queries[rows], contexts, use_reentrant=False)
        return {self.loss_name: total / counts[self.loss_name].clamp(min=1.0)}

    def loss_of(self, output: dict[str, Tensor], rows: slice, queries: Tensor, contexts: Tensor) -> Tensor:
        """The sum of the cross entropies of the queries `rows`."""
        losses = F.cross_entropy(self.scores(output, rows, queries, contexts), own(output, rows), reduction="none")
        return (losses * output["counted"][rows]).sum() if "counted" in output else losses.sum()

    def scores(self, output: dict[str, Tensor], rows: slice, queries: Tensor, contexts: Tensor) -> Tensor:
        """[queries of `rows`, C]: dot products, -inf where a context is no candidate for a query."""
        scores = queries @ contexts.t() * self.scale
        if (excluded := self.excluded(output, rows)) is not None:
            scores = scores.masked_fill(excluded, -torch.inf)
        return scores

    def excluded(self, output: dict[str, Tensor], rows: slice) -> Tensor | None:
        """True [queries of `rows`, C] for contexts that are no candidates of a query: they are not there, or with
        --retriever-mask-same-document they are of its own context's document.
        """
        found = None
        if "context_mask" in output:
            found = (output["context_mask"].flatten() == 0).expand(rows.stop - rows.start, -1)
        if self.mask_same_document and "document" in output:
            documents = output["document"]
            same = documents[rows, :1] == documents.flatten()[None]
            found = same if found is None else same | found
        if found is not None:  # the own one always is: that of a sample that does not count must give finite numbers
            found = found.scatter(1, own(output, rows)[:, None], False)
        return found

    def chunks(self, output: dict[str, Tensor]) -> Iterator[slice]:
        """The queries in order, --retriever-chunk-queries at a time."""
        number = len(output["queries"])
        return (slice(first, min(first + self.chunk, number)) for first in range(0, number, self.chunk))

    def metrics(self, output: dict[str, Tensor], batch: Batch) -> dict[str, MetricSums]:
        """Top-k accuracies."""
        ranks, weights = self.ranks(output), output.get("counted", torch.ones_like(output["queries"][:, 0]))
        return {name: (((ranks < k) * weights).sum(), weights.sum()) for name, k in zip(self.top_names, self.top)}

    def ranks(self, output: dict[str, Tensor]) -> Tensor:
        """[B]: how many other contexts score at least as high as a query's own."""
        queries, contexts = vectors(output)
        parts = []
        for rows in self.chunks(output):
            scores = self.scores(output, rows, queries[rows], contexts)
            mine = scores.gather(1, own(output, rows)[:, None])
            parts.append((scores >= mine).sum(dim=1) - 1)
        return torch.cat(parts)


class PassageRetrieval(InverseCloze):
    """InverseCloze for questions with passages that are known to be wrong, as RET-FINETUNE-NQ trains.

    Reports the average rank too: how many passages of the batch score at least as high as the right one, 0 at best
    (Karpukhin et al.'s average-rank validation, whose batch is as large as a validation batch here).
    """

    loss_name = "retrieval loss"

    def setup(self, config: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None) -> None:
        """As InverseCloze."""
        super().setup(config, mesh, tokenizer)
        self.metric_names = [*self.top_names, "average rank"]

    def metrics(self, output: dict[str, Tensor], batch: Batch) -> dict[str, MetricSums]:
        """Top-k accuracies and the average rank."""
        ranks, weights = self.ranks(output), output.get("counted", torch.ones_like(output["queries"][:, 0]))
        return super().metrics(output, batch) | {"average rank": ((ranks * weights).sum(), weights.sum())}


def counted(batch: Batch) -> Tensor:
    """float32 [b]: 1 for the samples that count."""
    ids = batch["query_ids"]
    return batch.get("loss_mask", torch.ones(len(ids), dtype=torch.float32, device=ids.device))


def vectors(output: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries [B, p] and all contexts [C, p]."""
    return output["queries"], output["contexts"].flatten(0, 1)


def own(output: dict[str, Tensor], rows: slice) -> Tensor:
    """The column of each query's own context: the first of its contexts."""
    numbers = torch.arange(rows.start, rows.stop, device=output["queries"].device)
    return numbers * output["contexts"].shape[1]
