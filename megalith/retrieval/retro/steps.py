"""The three steps in one folder, each from what its command says; what the steps have in common is opened once."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, problem
from megalith.config.environment import world_size
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.build import build_datasets, sample_counts
from megalith.data.retro import ChunkDatabase, Neighbors, samples_fingerprint
from megalith.data.samples.splits import SPLIT_NAMES
from megalith.data.tokenizers.given import TokenizerOverride
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, tokenizer_from_config
from megalith.retrieval import search
from megalith.retrieval.embed import BertEmbedder
from megalith.retrieval.retro import database, index, neighbors
from megalith.retrieval.retro.database import ChunkTexts
from megalith.retrieval.store import Store, check_probe, faiss_digest
from megalith.runtime.load import open_weights

FASTER = "Give megalith retro db in one process first, with --workers N; the other steps run in many"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetroOptions:
    """What the flags of the steps say beside those of the GPT's data.

    load: the BERT, in any format; iteration: of its checkpoint. bert_tokenizer: fields of the tokenizer, where it is
    named. index_string: an index of FAISS; None searches exactly. train_rows: vectors that it is trained on. ef_search,
    nprobe: FAISS's. shard_rows: vectors of a file.
    """

    workdir: str
    load: str | None = None
    iteration: int | None = None
    bert_tokenizer: dict[str, str] = dataclasses.field(default_factory=dict)
    chunk_length: int = 64
    doc_block_size: int = 100_000
    workers: int = 1
    index_string: str | None = None
    train_rows: int = 100_000
    ef_search: int = 256
    nprobe: int = 65536
    shard_rows: int = 65536
    query: neighbors.Query = dataclasses.field(default_factory=neighbors.Query)


class Steps:
    """`db`, `index` and `neighbors`, each resumed where it is begun. Every process calls the last two."""

    def __init__(self, config: RunConfig, options: RetroOptions, notice: Callable[[str], None]):
        """config: of the GPT's training (data, tokenizer, split, seed, samples), and of this layout. notice: prints."""
        options.query.check()
        self.config, self.options, self.notice = config, options, notice
        self.workdir = pathlib.Path(options.workdir)

    @functools.cached_property
    def gpt(self) -> Tokenizer:
        """The tokenizer of the data."""
        return tokenizer_from_config(self.config.data, self.config.model.vocab_size)

    @functools.cached_property
    def bert(self) -> Tokenizer:
        """The tokenizer that texts are measured with: the one that is named, or that of the BERT."""
        if self.options.bert_tokenizer:
            return build_tokenizer(**{"tokenizer_type": "BertWordPieceLowerCase", **self.options.bert_tokenizer})
        source = open_weights(self._load, self.options.iteration)
        if source.tokenizer is None:
            rule = f"must be named, as {self._load} has none"
            raise ConfigError(problem("The tokenizer of BERT", None, rule, "Give --retro-bert-vocab-file FILE"))
        return load_tokenizer(source.tokenizer, source.config.data)

    @property
    def _load(self) -> str:
        if self.options.load is None:
            rule = "must name a BERT: a run of megalith pretrain bert, a checkpoint, a Hugging Face folder"
            raise ConfigError(problem("--load", None, rule, "Write --load runs/bert"))
        return self.options.load

    @functools.cached_property
    def embedder(self) -> BertEmbedder:
        """The BERT, in the layout of the config."""
        given = self.options.bert_tokenizer
        named = TokenizerOverride(None, {"tokenizer_type": "BertWordPieceLowerCase", **given}) if given else None
        found = BertEmbedder.load(
            self._load, self.config.parallel, dtype=getattr(torch, self.config.precision.compute_dtype),
            iteration=self.options.iteration, tokenizer=named,
        )  # fmt: skip
        positions, length = found.model.max_position_embeddings, self.options.query.max_length
        if positions and length > positions:
            rule = f"must be at most the positions of the BERT, {positions}"
            raise ConfigError(problem("--retro-bert-max-chunk-length", length, rule, f"Write {positions}"))
        return found

    @functools.cached_property
    def database(self) -> ChunkDatabase:
        """The database, complete and made with these tokenizers."""
        found = ChunkDatabase(self.workdir / "db")
        database.check_vocabularies(found, self.gpt, self.embedder.tokenizer)
        return found

    @functools.cached_property
    def chunks(self) -> index.Chunks:
        """The texts of the database's chunks."""
        return index.Chunks(self.database, self.gpt, self.embedder.tokenizer, self.options.query.max_length)

    def db(self) -> str:
        """Build the database, in this process and those that it starts."""
        if world_size() > 1:
            raise ConfigError(problem("WORLD_SIZE", world_size(), "must be 1 for this step", FASTER))
        options = self.options
        description = database.describe(
            self.config.data, self.gpt, self.bert, chunk_length=options.chunk_length,
            doc_block_size=options.doc_block_size, notice=self.notice,
        )  # fmt: skip
        folder = self.workdir / "db"
        found = database.build_database(
            folder, description, self.gpt, self.bert, workers=options.workers, notice=self.notice, shown=True
        )
        documents = sum(each["documents"][1] - each["documents"][0] for each in description["datasets"])
        return (
            f"{folder}: {len(found)} chunks of {options.chunk_length} tokens from {documents} documents in "
            f"{len(found.ranges)} blocks; {found.invalid} chunks without text are left out"
        )

    def index(self) -> str:
        """Embed the chunks, and build the index of FAISS that is asked for."""
        options, folder = self.options, self.workdir / "index"
        plan = index.build_index(
            self.embedder, self.chunks, folder, batch_size=options.query.batch_size, shard_rows=options.shard_rows,
            notice=self.notice,
        )  # fmt: skip
        text = f"{folder}: {plan.rows} vectors of {plan.width} in {plan.shards} shards"
        return text + Ranks().on_rank_0(self._build_faiss)

    def _build_faiss(self) -> str:
        if (name := self.options.index_string) is None:
            return ""
        store = Store(self.workdir / "index")
        found = search.build_faiss(store, name, train_rows=self.options.train_rows, notice=self.notice)
        return f"; {name}: recall of the 20 nearest {search.measure_recall(store, self._searching(found)):.3f}"

    def _searching(self, found: search.FaissIndex) -> search.FaissIndex:
        """The index with the settings of a search."""
        found.set_options(efSearch=self.options.ef_search, nprobe=self.options.nprobe)
        return found

    def neighbors(self) -> str:
        """Find the neighbours of all training, validation and test samples."""
        store, options = Store(self.workdir / "index"), self.options
        store.check_source(self.chunks.describe())
        check_probe(store, self.embedder.probe(), self._load)
        searched: neighbors.Index
        if options.index_string is None:
            searched = search.ExactIndex(store, cache=self.embedder.runtime.mesh.world_size == 1)
            index_facts: dict[str, Any] = {"index": [store.digest, "exact"]}
        else:
            searched = self._searching(search.FaissIndex(store, options.index_string))
            settings = f"efSearch {options.ef_search}, nprobe {options.nprobe}"
            index_facts = {"index": [store.digest, options.index_string, faiss_digest(searched.path), settings]}
        config = self.config.replace(dataset="gpt")
        datasets, lines = build_datasets(config, self.gpt), []
        for split, count in zip(SPLIT_NAMES, sample_counts(config)):
            if datasets[split] is None:
                self.notice(f"no neighbours for {split}: there are no such samples")
                continue
            samples = neighbors.SampleChunks(datasets[split], self.database, ChunkTexts(self.gpt))
            fingerprint = samples_fingerprint(config, split, count, self.database)
            folder = self.workdir / "neighbors" / split
            neighbors.find_neighbors(
                self.embedder, searched, samples, folder, fingerprint | index_facts, options.query, notice=self.notice
            )
            Neighbors(folder, fingerprint)  # as training opens it
            kept = f"{options.query.num_target} neighbours of each of {samples.chunks} chunks"
            lines.append(f"{folder}: {kept} of {count} samples")
        if not lines:
            found = Words("no samples")
            rule = "must have samples for the neighbours of the training that reads them"
            raise ConfigError(
                problem("The run", found, rule, "Write --train-samples and --global-batch-size, as there")
            )
        return "\n".join(lines)
