"""From a script's torch DataLoader to that of a parallel layout: larger batches, of this process's samples."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.integrations.accelerate.data.indexed import MegatronLMDummyDataLoader
from megalith.integrations.accelerate.data.loader import MegatronDataLoader, Readers
from megalith.integrations.accelerate.data.sharding import ShardedBatches, SharedCollate
from megalith.runtime.build import Mesh

KEPT = (  # options of a DataLoader that the new one has too
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


def prepare_loader(
    loader: Any, *, num_micro_batches: int, rank: int, size: int, device: torch.device | None, dataloader_config: Any,
    rng_types: Collection[str] | None = None, mesh: Mesh | None = None,
) -> Any:  # fmt: skip
    """The loader of data-parallel process `rank` of `size`: a batch is num_micro_batches of the script's.

    The samples of the batches of all processes, in the order of their ranks, are those of one process with batches
    num_micro_batches x size times as large; the last batch of an epoch is divided evenly. A loader that was prepared
    before is returned as it is.
    device: where batches are put; None leaves them. dataloader_config: Accelerate's DataLoaderConfiguration. rng_types:
    Accelerate's. mesh: of all processes; None where they are simulated one by one.
    Raises ConfigError where the size of the batches is not known, or an option cannot be kept.
    """
    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        return loader
    if mesh is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise TypeError("prepare_loader needs `mesh` where there are several processes, which must agree on batches")
    if dataloader_config.split_batches:
        rule = "must be False, as the batch size of a script is that of a micro-batch"
        cure = f"Leave it out, and divide batch_size by {num_micro_batches * size}"
        raise ConfigError(problem("DataLoaderConfiguration(split_batches=...)", True, rule, cure))
    streams = isinstance(loader.dataset, IterableDataset)
    wanted = dataloader_config.dispatch_batches
    readers = _readers(rank, size, mesh, streams if wanted is None else wanted)
    batch_size, together, even = batch_size_of(loader), num_micro_batches * size, dataloader_config.even_batches
    options = {name: getattr(loader, name) for name in KEPT if hasattr(loader, name)}
    shares = range(size) if readers.dispatched else [rank]
    collate, shards = SharedCollate(loader.collate_fn, shares, size, even), None
    if streams:
        if batch_size is None:
            raise ConfigError(_unknown_size("a dataset that gives whole batches", "Let it give samples"))
        options |= {"batch_size": batch_size * together, "drop_last": loader.drop_last, "collate_fn": collate}
    else:
        own, fetches_lists = _batch_sampler(loader, dataloader_config, readers), loader.batch_sampler is None
        if fetches_lists and readers.dispatched:
            rule = "must be False or None for a DataLoader(sampler=BatchSampler(...), batch_size=None)"
            raise ConfigError(problem("DataLoaderConfiguration(dispatch_batches=...)", True, rule, "Leave it out"))
        one = (0, 1) if readers.dispatched else (rank, size)
        shards = ShardedBatches(own, batch_size=batch_size, together=together, rank=one[0], size=one[1], even=even)
        options |= {"sampler": shards, "batch_size": None} if fetches_lists else {"batch_sampler": shards}
        options |= {"collate_fn": collate} if readers.dispatched else {}
    return MegatronDataLoader(
        loader.dataset, readers=readers, shards=shards, micro_batch_size=batch_size,
        global_batch_size=batch_size and batch_size * together, even=even, generators=_generators(loader),
        rng_types=rng_types or (), resumes_position=dataloader_config.use_stateful_dataloader, device=device,
        _non_blocking=dataloader_config.non_blocking, **options,
    )  # fmt: skip


def _readers(rank: int, size: int, mesh: Mesh | None, dispatched: bool) -> Readers:
    if mesh is None or mesh.world_size == 1:
        return Readers(rank, size, dispatched=dispatched)
    everyone = Ranks()
    if dispatched:
        return Readers(rank, size, everyone, everyone, True)
    return Readers(rank, size, Ranks(mesh.model_group) if mesh.world_size > mesh.data_size else None, everyone)


def _batch_sampler(loader: DataLoader, dataloader_config: Any, readers: Readers) -> Any:
    """The script's sampler of batches, with a SeedableRandomSampler where Accelerate's configuration asks for one."""
    batches: Any = _script_sampler(loader)
    if loader.batch_sampler is None and not isinstance(batches, BatchSampler):
        raise ConfigError(_unknown_size("batch_size=None", "Give it a batch_size, or a batch_sampler"))
    sampler = getattr(batches, "sampler", None)
    if not dataloader_config.use_seedable_sampler or not isinstance(sampler, RandomSampler):
        return batches
    seed = dataloader_config.data_seed
    seed = torch.initial_seed() if seed is None else seed
    batches = copy.copy(batches)
    batches.sampler = SeedableRandomSampler(
        data_source=sampler.data_source, replacement=sampler.replacement, num_samples=sampler._num_samples,
        generator=sampler.generator,
        data_seed=seed if readers.everyone is None else readers.everyone.from_rank_0(seed),
    )  # fmt: skip
    return batches


def _generators(loader: DataLoader) -> list[torch.Generator]:
    """The generators of its own that decide on a loader's order, each once."""
    batches = _script_sampler(loader)
    owners = (loader, loader.dataset, batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _script_sampler(loader: DataLoader) -> Any:
    """The sampler of batches, which may stand where that of samples usually does."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def batch_size_of(loader: Any) -> int | None:
    """Samples of a batch of a script's loader, which is a micro-batch; None where it varies, or is not known."""
    if isinstance(loader, MegatronLMDummyDataLoader):
        return loader.dataset_args.get("micro_batch_size")
    if isinstance(loader, MegatronDataLoader):
        return loader.micro_batch_size
    if loader.batch_size is not None:
        return loader.batch_size
    return getattr(_script_sampler(loader), "batch_size", None)


def micro_batch_size_of(loaders: Iterable[Any], is_train_batch_min: bool) -> tuple[int, list[str]]:
    """The micro-batch size of a script, and lines for the user: the smallest batch size of its loaders, or the largest.

    Raises ConfigError where no loader has one.
    """
    sizes: Sequence[int] = [size for each in loaders if (size := batch_size_of(each)) is not None]
    if not sizes:
        raise ConfigError(
            "You must specify a training or evaluation dataloader in `accelerate.prepare()` when using Megatron-LM: "
            "its batch_size is the micro-batch. Give accelerator.prepare a DataLoader with a batch_size (a "
            "batch_sampler of your own needs an attribute batch_size), or a MegatronLMDummyDataLoader."
        )
    chosen = min(sizes) if is_train_batch_min else max(sizes)
    if len(set(sizes)) == 1:
        return chosen, []
    named, which = ", ".join(map(str, dict.fromkeys(sizes))), "smallest" if is_train_batch_min else "largest"
    return chosen, [
        f"batch sizes of the loaders are {named}; each keeps its own, and global_batch_size counts the {which}, "
        f"{chosen} (is_train_batch_min={is_train_batch_min})"
    ]


def _unknown_size(found: str, cure: str) -> str:
    rule = "must say how many samples a batch has, which is the micro-batch"
    return problem("A DataLoader", Words(found), rule, cure)
