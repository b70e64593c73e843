"""`PackedDataset` in loaders: ranks, workers that stay, epochs, and going on in the middle."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.dataset import PackedDataset
from packer.plan.drop import BetaDrop
from tests.helpers.samples import assert_same_batches, image_samples, sizes_of

# Python 3.12 and later warn where a process that runs threads (torch) forks DataLoader workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

SAMPLES = image_samples(60, unit=8)
SIZES = sizes_of(SAMPLES)
TOKENIZER = CaptionTokenizer.train(["picture number 1"] * 3, vocab_size=300)


def packed(**options: Any) -> PackedDataset:
    config = PackerConfig(patch_size=8, seq_len=40, token_drop=BetaDrop())
    return PackedDataset(SAMPLES, SIZES, config, sequences_per_batch=3, **options)


def every(dataset: PackedDataset) -> list[PackedBatch]:
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (1, 2), (2, 2)]
)
def test_all_ranks_together_see_every_image_once_in_every_epoch(
    world_size: int, workers: int
) -> None:
    """The workers stay: what changes from epoch to epoch reached them through `set_epoch`."""
    dataset, expected = packed(world_size=world_size), packed(world_size=world_size)
    loaders = [
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=False),
        )
        for rank in range(world_size)
    ]
    orders = []
    for epoch in (0, 1, 5, 0):
        dataset.set_epoch(epoch)
        expected.set_epoch(epoch)
        ranks = [list(loader) for loader in loaders]
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert_same_batches(batches, every(expected))
        stats = sum((batch.stats for batch in batches), BatchStats())
        keys = [key for batch in batches for key in batch.keys]
        assert sorted(keys) == sorted(map(str, range(60)))
        assert stats.samples_read == stats.images == 60
        assert all(batch.patches.shape == (3, 40, 192) for batch in batches)
        orders.append(keys)
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2]


def test_a_pass_that_is_left_early_does_not_disturb_the_next_epoch() -> None:
    dataset, expected = packed(), packed()
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, prefetch_factor=2
    )
    for epoch in range(1, 5):
        next(iter(loader))
        dataset.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert_same_batches(loader, every(expected))


def test_spawned_workers_follow_set_epoch_too() -> None:
    dataset, expected = packed(), packed()
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    for epoch in (0, 2):
        dataset.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert_same_batches(loader, every(expected))


def test_the_empty_steps_at_the_end_may_be_left_out() -> None:
    dataset = packed(world_size=2)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen = []
        for rank in range(2):
            sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=False)
            loader = DataLoader(dataset, batch_size=None, sampler=sampler)
            for batch in itertools.islice(loader, dataset.used_batches // 2):
                assert batch.num_images
                seen += batch.keys
        assert sorted(seen) == sorted(map(str, range(60)))


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_pass_resumes_at_any_step_on_every_rank(step: int) -> None:
    whole, resumed = packed(world_size=2), packed(world_size=2)
    whole.set_epoch(3)
    resumed.set_epoch(3)
    for rank in range(2):
        sampler = DistributedSampler(whole, num_replicas=2, rank=rank, shuffle=False)
        first = DataLoader(whole, batch_size=None, sampler=sampler)
        rest = DataLoader(resumed, batch_size=None, sampler=range(2 * step + rank, len(resumed), 2))
        assert_same_batches(rest, itertools.islice(first, step, None))


def test_captions_and_labels_come_out_of_a_worker_with_their_images() -> None:
    loader = DataLoader(packed(tokenizer=TOKENIZER), batch_size=None, num_workers=1)
    for batch in loader:
        batch.check()
        if batch.num_images:
            assert batch.texts == tuple(f"picture number {key}" for key in batch.keys)
            assert batch.labels is not None
            assert torch.equal(batch.labels, torch.tensor([int(key) for key in batch.keys]))
