"""Texts to vectors by a trained bi-encoder or BERT, and a store of them by any number of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, problem
from megalith.common.files import remove_leftovers_in
from megalith.common.locks import locked
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.sections.parallel import ParallelConfig
from megalith.data.corpus.preprocess_pool import ENGINES
from megalith.data.tokenizers.given import TokenizerOverride
from megalith.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalith.retrieval import store
from megalith.retrieval.progress import Progress
from megalith.retrieval.sources import Source, open_source, pack_queries, words
from megalith.runtime.build import Runtime
from megalith.runtime.load import load_runtime

ROUND = 8  # texts of a batch are padded to a multiple of this


class TextEmbedder:
    """A model in a layout, in evaluation mode, that makes vectors of texts. Every process of a model (tp, pp) calls the
    same methods.
    """

    rule = "must be a model that embeds texts"

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, name: str, config: Any):
        """name: of the checkpoint. config: the RunConfig that it was trained with."""
        self.runtime, self.tokenizer, self.name, self.config = runtime, tokenizer, name, config
        self.pad = tokenizer.require("pad")

    @property
    def model(self) -> ModelConfig:
        """The config of the model."""
        return self.runtime.config.model

    @property
    def width(self) -> int:
        """Elements of a vector."""
        raise NotImplementedError

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether this class embeds with such a model."""
        raise NotImplementedError

    @classmethod
    def load(
        cls, path: str | os.PathLike, parallel: ParallelConfig | None = None, *, dtype: torch.dtype = torch.float32,
        iteration: int | None = None, tokenizer: TokenizerOverride | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Self:  # fmt: skip
        """The model of a run or checkpoint. Raises ConfigError where it is another model, or has no tokenizer.

        parallel: every data-parallel process has a whole model, whatever it says of sharding: they embed other numbers
        of texts, so that one that gathered shards would wait for the others. tokenizer: must have the tokens of the
        checkpoint's, where that has one. options: how another format is read (runtime/load.py: format_options).
        """
        layout = RunConfig(parallel=parallel or ParallelConfig())
        parallel = layout.replace(use_distributed_optimizer=False, data_parallel_sharding="none").parallel
        given = tokenizer or TokenizerOverride()
        options = {**(options or {}), "vocabulary_size": given.vocab_size}
        runtime, source = load_runtime(path, parallel, dtype=dtype, iteration=iteration, options=options)
        if not all(cls.fits(stage.model) for stage in runtime.stages):
            found = source.config.model.model_type
            raise ConfigError(problem(str(path), Words(f"a {found}"), cls.rule, "Name another run"))
        if runtime.mesh.size("cp") > 1:
            rule = "must be 1, because texts are embedded whole"
            raise ConfigError(problem("--context-parallel-size", runtime.mesh.size("cp"), rule, "Leave it out"))
        stored = None if source.tokenizer is None else load_tokenizer(source.tokenizer, source.config.data)
        used = given.build(source.config.data) if given else stored
        if stored is not None and used is not stored and words(stored) != words(used):
            rule = f"must have the tokens of the one in {source.tokenizer}"
            raise ConfigError(problem("The tokenizer", Words("others"), rule, "Leave it out: the checkpoint has it"))
        if used is None:
            rule = "must be named, as the checkpoint has none"
            raise ConfigError(problem("The tokenizer", None, rule, "Give --vocab-file FILE"))
        if runtime.mesh.is_main_process:
            for note in (*source.notes, *given.notes):
                print(f"{path}: {note}", file=sys.stderr, flush=True)
        return cls(runtime, used, str(path), source.config)

    def length(self, given: int | None) -> int:
        """Tokens of a text: what is given, or what the model was trained with. Raises ConfigError where it has fewer
        positions.
        """
        most = self.model.max_position_embeddings or 0
        found = given or self.config.data.seq_length or most
        if found > most:
            rule = f"must be at most the model's --max-position-embeddings, {most}"
            raise ConfigError(problem("--seq-length", found, rule, "Write a smaller number, or leave it out"))
        return found

    def batch(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids [n, s] of texts, padded, and the mask of what is no padding, on the device."""
        longest = -(-max(map(len, rows)) // ROUND) * ROUND
        longest = min(longest, self.model.max_position_embeddings or longest)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        return ids.to(self.runtime.mesh.device), mask.to(self.runtime.mesh.device)

    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """Vectors float32 [n, p], on the CPU, of the ids of texts; None on processes without the end of the model."""
        raise NotImplementedError

    def probe_text(self) -> list[int]:
        """The ids of the shortest text."""
        return [self.tokenizer.require("cls"), self.tokenizer.require("sep")]

    def probe(self) -> tuple[float, ...]:
        """The vector of the shortest text, on every process: what tells one model from another."""
        vector = self._shared(self.embed([self.probe_text()]), 1)[0]
        return tuple(round(float(value), 6) for value in vector)

    def _shared(self, vectors: Tensor | None, count: int) -> Tensor:
        """Vectors of the processes with the end of the model, on all of them."""
        values = torch.zeros(count, self.width) if vectors is None else vectors
        return self.runtime.from_last_stage(values.to(self.runtime.mesh.device)).cpu()


class Embedder(TextEmbedder):
    """A bi-encoder."""

    rule = "must be a bi-encoder, as megalith pretrain ict trains"

    @property
    def width(self) -> int:
        """Elements of a vector."""
        return self.model.biencoder_projection_dim or self.model.hidden_size or 0

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """See TextEmbedder."""
        return hasattr(model, "context_head")

    @torch.no_grad()
    def embed(self, rows: Sequence[Sequence[int]], kind: str = "context") -> Tensor | None:
        """Vectors float32 [n, p], on the CPU, of ids of contexts, or of queries; None on processes without the end of
        the model.
        """
        ids, mask = self.batch(rows)
        if kind == "query":
            output = self.runtime.forward(ids, context_ids=None, padding_mask=mask)
        else:
            output = self.runtime.forward(None, context_ids=ids, context_padding_mask=mask)
        return None if output is None else output[kind == "context"].float().cpu()

    def queries(self, texts: Sequence[str], batch_size: int = 128) -> Tensor | None:
        """Vectors [n, p] of questions, or None as `embed`."""
        rows = pack_queries(self.tokenizer, texts, self.model.max_position_embeddings or 512)
        parts = [self.embed(rows[first : first + batch_size], "query") for first in range(0, len(rows), batch_size)]
        return None if parts[0] is None else torch.cat(parts)

    def shared_queries(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Vectors [n, p] of questions, on every process of the model."""
        return self._shared(self.queries(texts, batch_size), len(texts))


class BertEmbedder(TextEmbedder):
    """A BERT: the vector of a text is the mean of the last hidden states of its tokens, [CLS] and [SEP] left out.

    As Retro's keys (Borgeaud et al., 2022, section 2.3: "averaged over time") in Megatron.
    """

    rule = "must be a BERT, as megalith pretrain bert trains"

    def __init__(self, *arguments: Any):
        """As TextEmbedder."""
        super().__init__(*arguments)
        for stage in self.runtime.stages:
            stage.model.head = None  # without it the forward pass ends with the hidden states

    @property
    def width(self) -> int:
        """Elements of a vector."""
        return self.model.hidden_size or 0

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """See TextEmbedder."""
        return hasattr(model, "head_dense")

    def probe_text(self) -> list[int]:
        """The ids of a text of one token."""
        return [*super().probe_text(), self.tokenizer.require("sep")]

    @torch.no_grad()
    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """See TextEmbedder. Each text has a token between [CLS] and [SEP]."""
        ids, mask = self.batch(rows)
        output = self.runtime.forward(ids, padding_mask=mask)
        if output is None:
            return None
        lengths = mask.sum(dim=1, keepdim=True)
        places = torch.arange(ids.shape[1], device=ids.device)
        inner = ((places >= 1) & (places < lengths - 1)).unsqueeze(-1)
        return ((output.float() * inner).sum(dim=1) / (lengths - 2)).cpu()


@dataclasses.dataclass(frozen=True)
class Workers:
    """Processes that embed shards in the place of this one: of this machine, or of many by Ray.

    engine: a name of data/corpus/preprocess_pool.py: ENGINES. count: 0 for all that the engine finds. load: makes the
    embedder in each of them, and is pickled. gpus: each takes a GPU of Ray's, where its cluster has some.
    """

    engine: str
    load: Callable[[], TextEmbedder]
    count: int = 0
    gpus: bool = False


@dataclasses.dataclass(frozen=True)
class Embed:
    """The job of such workers: its parts are shards, each worker has a whole model."""

    workers: Workers
    plan: store.Plan
    folder: str
    batch_size: int

    @property
    def gpus(self) -> bool:
        """See preprocess_pool.run_ray."""
        return self.workers.gpus

    def worker(self) -> Callable[[int], dict]:
        """What embeds a shard, and says how many texts it had. On one core, as engines start one for each."""
        torch.set_num_threads(1)
        embedder = self.workers.load()
        source = open_source(self.plan.source, embedder.tokenizer)

        def embed(shard: int) -> dict:
            _write(embedder, source, self.folder, self.plan, [shard], self.batch_size)
            return {"texts": len(self.plan.range_of(shard))}

        return embed


def build(
    embedder: TextEmbedder, source: Source, folder: str | os.PathLike, *, batch_size: int = 128,
    shard_rows: int = 65536, metric: str = "", check: bool = False, workers: Workers | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> store.Plan:  # fmt: skip
    """Embed a source into a store, or resume that. Every process calls it.

    metric: by which vectors are compared, see search.py. check: see store.begin. workers: embed instead of the calling
    process, which must be the only one then; the source is one that `open_source` opens, in files that all see.

    Shard n is written by data-parallel rank n modulo their number, or by whichever worker is free. A vector depends on
    its batch alone, which lies within a shard, so that any number of processes writes the same files. Memory of each: a
    shard's vectors.
    """
    mesh, ranks = embedder.runtime.mesh, Ranks()
    dtype = str(next(embedder.runtime.stages[0].model.parameters()).dtype).removeprefix("torch.")
    settings = {"batch_size": batch_size, "dtype": dtype} | ({"metric": metric} if metric else {})
    plan = store.Plan(
        len(source), embedder.width, shard_rows, source.columns, source.describe(),
        os.path.abspath(embedder.name) if os.path.exists(embedder.name) else embedder.name, embedder.probe(), settings,
    )  # fmt: skip
    with contextlib.ExitStack() as held:
        if mesh.is_main_process:
            lock = locked(folder, inside=True, notice=notice)
        ranks.on_rank_0(lambda: held.enter_context(lock) and None)
        missing = ranks.on_rank_0(lambda: _begin(folder, plan, check, notice))
        if len(missing) < plan.shards and mesh.is_main_process:
            notice(f"{folder}: {plan.shards - len(missing)} of {plan.shards} shards are there, the others follow")
        progress = Progress(sum(len(plan.range_of(shard)) for shard in missing), mesh.is_main_process)
        if workers:
            job = Embed(workers, plan, os.path.abspath(folder), batch_size)
            if missing:  # else workers would load the model for nothing
                for done in ENGINES.find(workers.engine)(job, iter(missing), workers.count):
                    progress.add(done["texts"])
            store.Store(folder)  # raises where a machine that sees other files has written elsewhere
            return plan
        mine = missing[mesh.data_rank :: mesh.data_size]
        ranks.on_every_rank(lambda: _write(embedder, source, folder, plan, mine, batch_size, progress))
    return plan


def _begin(
    folder: str | os.PathLike, plan: store.Plan, check: bool, notice: Callable[[str], None]
) -> list[int]:  # fmt: skip
    missing = store.begin(folder, plan, check, notice)
    remove_leftovers_in(folder, notice)
    return missing


def _write(
    embedder: TextEmbedder, source: Source, folder: str | os.PathLike, plan: store.Plan, shards: Sequence[int],
    batch_size: int, progress: Progress | None = None,
) -> None:  # fmt: skip
    mesh = embedder.runtime.mesh
    writes = embedder.runtime.has_last_stage and mesh.rank("tp") == 0
    for shard in shards:
        numbers, parts = plan.range_of(shard), list[np.ndarray]()
        for first in range(numbers.start, numbers.stop, batch_size):
            batch = range(first, min(first + batch_size, numbers.stop))
            vectors = embedder.embed(source.ids(batch))
            if writes and vectors is not None:
                parts.append(vectors.numpy())
            if progress:
                progress.add(len(batch) * mesh.data_size)
        if writes:
            store.write_shard(folder, shard, np.concatenate(parts), source.rows(numbers))
