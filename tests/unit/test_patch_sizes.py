"""Patch sizes drawn for each image: the plan, mixed batches, and batches of one size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packer import (
    ConstantDrop,
    FixedSide,
    NoCrop,
    NoDrop,
    OnePatchSize,
    PackedBatch,
    PackedDataset,
    PackerConfig,
    PackingCollator,
    RandomCrop,
    RandomPatchSize,
    ScheduledPatchSize,
    UniformSide,
    pack,
)
from packer.plan.draws import keyed_draws
from packer.plan.epoch import EpochPlanner, kept_lengths
from packer.plan.image import plan_image
from packer.plan.many import plan_lengths, plan_patches
from packer.plan.patch_size import PatchSizes
from packer.plan.place import Placement
from packer.plan.resize import Native
from packer.plan.show import plan_text
from packer.plan.simulate import laion_sizes
from packer.plan.types import ImageSize
from packer.stream import LoaderState, PackedStream
from packer.tools.show import Show
from tests.helpers.samples import (
    assert_same_batches,
    cut_png,
    drain,
    image_samples,
    make_shards,
    unpack,
)

SIZES = (4, 8, 16)
image_sizes = st.builds(ImageSize, st.integers(1, 900), st.integers(1, 900))
weights = st.lists(st.floats(0, 5), min_size=3, max_size=3).map(tuple).filter(sum)
drawn = st.one_of(
    st.builds(RandomPatchSize, st.just(SIZES), weights | st.just(()), st.booleans()),
    st.builds(
        ScheduledPatchSize, st.just(SIZES), weights, weights, st.integers(1, 2000), st.booleans()
    ),
)
configs = st.builds(
    PackerConfig,
    seq_len=st.just(256),
    max_tokens=st.sampled_from([None, 1, 49]),
    patch_sizes=drawn,
    resolution=st.sampled_from([Native(), FixedSide(64.3), UniformSide(16, 300)]),
    crop=st.sampled_from([NoCrop(), RandomCrop(0.3)]),
    resize=st.sampled_from(["shrink_only", "allow_enlarge", "fill_budget"]),
)


def one_size(config: PackerConfig, size: int) -> PackerConfig:
    """Return the configuration that gives every image patches of this size."""
    return replace(config, patch_sizes=OnePatchSize(), patch_size=size)


def binomial_bound(n: int, share: float) -> float:
    return 5 * (n * share * (1 - share)) ** 0.5


@settings(max_examples=60)
@given(key=st.text(max_size=6), size=image_sizes, config=configs, seen=st.integers(0, 3000))
def test_a_plan_is_that_of_its_patch_size_alone(
    key: str, size: ImageSize, config: PackerConfig, seen: int
) -> None:
    plan = plan_image(key, size, config, images_seen=seen)
    assert plan.patch_size in SIZES
    alone = plan_image(key, size, one_size(config, plan.patch_size), images_seen=seen)
    assert plan == alone


@settings(max_examples=60)
@given(key=st.text(max_size=6), size=image_sizes, config=configs)
def test_within_budget_shrinks_no_image_that_some_size_fits(
    key: str, size: ImageSize, config: PackerConfig
) -> None:
    config = replace(config, patch_sizes=RandomPatchSize(SIZES))
    plan = plan_image(key, size, config)
    free = replace(config, seq_len=10**6, max_tokens=10**6)
    if config.resize != "shrink_only" and isinstance(config.resolution, Native):
        free = replace(free, resize="shrink_only")  # else without a budget there is no grid
    wanted = {p: plan_image(key, size, one_size(free, p)).grid.num_tokens for p in SIZES}
    # A drawn area is an upper bound of the grid: rounding down may let a grid of it fit already.
    areas = {
        p: n
        if isinstance(config.resolution, Native)
        else min(
            n if config.resize == "shrink_only" else 10**6,
            int(config.resolution.side(keyed_draws(0, 0, key).resolution) ** 2 / p**2),
        )
        for p, n in wanted.items()
    }
    if any(n <= config.image_budget for n in areas.values()):
        assert wanted[plan.patch_size] <= config.image_budget
    else:
        assert plan.patch_size == max(SIZES)


@pytest.mark.parametrize("given_weights", [(), (1, 2, 5), (0, 3, 0)])
def test_sizes_are_drawn_as_often_as_their_weights_say(given_weights: tuple[float, ...]) -> None:
    config = PackerConfig(
        seq_len=64, patch_sizes=RandomPatchSize(SIZES, given_weights, within_budget=False)
    )
    n = 1500
    counts = Counter(plan_image(str(i), ImageSize(99, 60), config).patch_size for i in range(n))
    total = sum(given_weights) or 3
    for size, weight in zip(SIZES, given_weights or (1, 1, 1), strict=True):
        share = weight / total
        assert abs(counts[size] - n * share) <= binomial_bound(n, share), size


def test_the_budget_leaves_the_weights_of_the_sizes_that_fit_as_they_were() -> None:
    # 64 x 64 pixels are 256, 64 and 16 tokens: the smallest patch does not fit.
    config = PackerConfig(seq_len=100, patch_sizes=RandomPatchSize(SIZES, (9, 1, 3)))
    n = 1500
    counts = Counter(plan_image(str(i), ImageSize(64, 64), config).patch_size for i in range(n))
    assert counts[4] == 0
    assert abs(counts[8] - n / 4) <= binomial_bound(n, 0.25)


def test_a_schedule_begins_with_the_first_shares_and_stays_at_the_last() -> None:
    schedule = ScheduledPatchSize(SIZES, (0, 0, 1), (2, 0, 0), images=100)
    config = PackerConfig(seq_len=10**4, patch_sizes=schedule)

    def found(seen: int) -> Counter[int]:
        return Counter(
            plan_image(str(i), ImageSize(64, 64), config, images_seen=seen).patch_size
            for i in range(400)
        )

    assert found(0) == {16: 400}
    assert found(100) == found(10**12) == {4: 400}
    middle = found(25)
    assert set(middle) == {4, 16}
    assert abs(middle[4] - 100) <= binomial_bound(400, 0.25)
    assert schedule.shares(25) == (0.25, 0.0, 0.75)


def test_a_key_gets_the_same_size_in_any_order_and_another_in_another_epoch() -> None:
    config = PackerConfig(patch_sizes=RandomPatchSize())
    keys = [str(i) for i in range(60)]

    def chosen(keys: Sequence[str], epoch: int = 0) -> dict[str, int]:
        size = ImageSize(120, 90)
        return {key: plan_image(key, size, config, epoch=epoch).patch_size for key in keys}

    assert chosen(keys) == chosen(keys[::-1])
    assert chosen(keys) != chosen(keys, epoch=1)


@given(
    config=configs,
    sizes=st.lists(image_sizes, min_size=1, max_size=12),
    epoch=st.integers(0, 2),
    seen=st.integers(0, 10**13),
)
def test_the_plan_of_an_epoch_is_that_of_each_image(
    config: PackerConfig, sizes: list[ImageSize], epoch: int, seen: int
) -> None:
    keys = [f"image {i}" for i in range(len(sizes))]
    each = seen + np.arange(len(sizes)) * 170
    found = kept_lengths(keys, np.array(sizes), config, epoch=epoch, images_seen=each)
    plans = [
        plan_image(key, size, config, epoch=epoch, images_seen=n)
        for key, size, n in zip(keys, sizes, each.tolist(), strict=True)
    ]
    assert found.tolist() == [plan.num_kept for plan in plans]


@pytest.mark.parametrize("within_budget", [True, False])
@pytest.mark.parametrize("resolution", [Native(), UniformSide(64, 400)])
def test_simulated_sizes_and_lengths_are_distributed_as_planned_ones(
    within_budget: bool, resolution: Any
) -> None:
    config = PackerConfig(
        seq_len=256,
        resolution=resolution,
        patch_sizes=RandomPatchSize((8, 16, 32), (1, 2, 1), within_budget=within_budget),
    )
    n = 2000
    sizes = laion_sizes(n)
    lengths, patches = plan_patches(sizes, config, np.random.default_rng(1))
    plans = [plan_image(str(i), ImageSize(*s), config) for i, s in enumerate(sizes.tolist())]
    for size in (8, 16, 32):
        there = sum(plan.patch_size == size for plan in plans)
        assert abs(int((patches == size).sum()) - there) <= 1.5 * binomial_bound(n, there / n)
    planned = np.array([plan.num_kept for plan in plans])
    error = 5 * (2 * planned.var() / n) ** 0.5
    assert abs(lengths.mean() - planned.mean()) <= error
    assert np.array_equal(lengths, plan_lengths(sizes, config, np.random.default_rng(1)))


def test_one_patch_size_draws_nothing() -> None:
    sizes = laion_sizes(500)
    drop = PackerConfig(token_drop=ConstantDrop(0.2), resolution=UniformSide())
    one = replace(drop, patch_sizes=RandomPatchSize((16,), within_budget=False))
    plans = [
        [plan_image(str(i), ImageSize(*s), c) for i, s in enumerate(sizes.tolist())]
        for c in (drop, one)
    ]
    assert plans[0] == plans[1]


def test_an_epoch_of_a_schedule_has_room_where_tokens_are_most() -> None:
    schedule = ScheduledPatchSize(SIZES, (0, 0, 1), (1, 0, 0), images=900)
    config = PackerConfig(seq_len=512, max_tokens=512, patch_sizes=schedule)
    sizes = np.full((300, 2), 64)
    planner = EpochPlanner(sizes, np.arange(300), None, config, True, 2, 2, 384)
    steps = planner.num_steps(planner.place(0))
    for epoch in range(5):
        assert planner.deal(planner.place(epoch), steps).left_out == 0
    assert len(planner.place(4).sequences) > 3 * len(planner.place(0).sequences)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomPatchSize(()), "sizes must be positive integers, each larger"),
        (lambda: RandomPatchSize((8, 8)), "each larger than the one before; got \\(8, 8\\)"),
        (lambda: RandomPatchSize((16, 8)), "Sort them"),
        (lambda: RandomPatchSize((0, 8)), "sizes must be positive"),
        (lambda: RandomPatchSize((8.0, 16)), "sizes must be positive integers"),
        (lambda: RandomPatchSize((8, 16), (1.0,)), "one entry for each of the 2 sizes; got 1"),
        (lambda: RandomPatchSize((8, 16), (1.0, -1.0)), "must not be negative"),
        (lambda: RandomPatchSize((8, 16), (0.0, 0.0)), "one of them must be positive"),
        (lambda: RandomPatchSize((8,), (float("nan"),)), "must not be negative"),
        (lambda: ScheduledPatchSize((8,), (), (1,), 5), "first must have one entry"),
        (lambda: ScheduledPatchSize((8,), (1,), (0,), 5), "last must not be negative"),
        (lambda: ScheduledPatchSize((8,), (1,), (1,), 0), "images must be a positive integer"),
        (lambda: PackerConfig(patch_sizes=(8, 16)), "patch_sizes must be one of OnePatchSize"),
        (lambda: PackerConfig(patch_mixing="both"), "patch_mixing must be one of 'mixed'"),
    ],
)
def test_a_wrong_setting_says_what_must_hold(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("patch_sizes", "mixing", "largest", "separate"),
    [
        (OnePatchSize(), "uniform", 12, ()),
        (RandomPatchSize(SIZES), "mixed", 16, ()),
        (RandomPatchSize(SIZES), "uniform", 16, SIZES),
        (RandomPatchSize((8,)), "uniform", 8, ()),
    ],
)
def test_the_configuration_knows_its_sizes(
    patch_sizes: PatchSizes, mixing: Any, largest: int, separate: tuple[int, ...]
) -> None:
    config = PackerConfig(patch_size=12, patch_sizes=patch_sizes, patch_mixing=mixing)
    assert config.largest_patch_size == largest
    assert config.separate_patch_sizes == separate


def loading(mixing: str, **options: Any) -> PackerConfig:
    return PackerConfig(
        **{
            "seq_len": 32,
            "patch_sizes": RandomPatchSize(SIZES),
            "patch_mixing": mixing,
            "token_drop": ConstantDrop(0.25),
            "placement": Placement("exact", window=8, max_age=30),
        }
        | options
    )


def patch_sizes_of(batch: PackedBatch) -> set[int]:
    """Patch sizes of a batch's images."""
    if batch.patch_sizes is None:
        return {batch.patch_size} if batch.num_images else set()
    return set(batch.patch_sizes[batch.image_index >= 0].tolist())


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), fill=st.booleans())
def test_images_of_a_mixed_batch_are_those_packed_alone_at_their_size(
    seed: int, fill: bool
) -> None:
    samples = image_samples(7, unit=8, seed=seed)
    config = loading("mixed", seed=seed, fill_leftover=fill)
    batches = list(pack(samples, config, sequences_per_batch=2))
    alone: dict[int, dict[str, Any]] = {}
    for size in SIZES:
        config_alone = replace(
            one_size(config, size), max_tokens=None, fill_leftover=False, token_drop=NoDrop()
        )
        alone[size] = {}
        for batch in pack(samples, config_alone, sequences_per_batch=2):
            alone[size] |= unpack(batch)
    seen = []
    for batch in batches:
        batch.check()
        assert batch.patch_size == max(patch_sizes_of(batch), default=batch.patch_size)
        for key, image in unpack(batch).items():
            slot = batch.image_index == batch.keys.index(key)
            sizes = batch.patch_sizes
            size = batch.patch_size if sizes is None else int(sizes[slot])
            whole = alone[size][key]
            assert image.grid == whole.grid
            index = image.positions[:, 0] * image.grid[1] + image.positions[:, 1]
            width = 3 * size**2
            assert torch.equal(image.patches[:, :width], whole.patches[index.long(), :width])
            seen.append(key)
    assert sorted(seen) == [sample["key"] for sample in samples]


def test_a_batch_whose_images_have_one_size_by_chance_is_one_of_that_size() -> None:
    config = loading("mixed", patch_sizes=RandomPatchSize(SIZES, (0, 1, 0)))
    for batch in pack(image_samples(9), config, sequences_per_batch=2):
        assert (batch.patch_size, batch.patch_sizes, batch.segment_patch_sizes) == (8, None, ())


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), count=st.integers(0, 40))
def test_a_uniform_batch_has_one_size_and_no_image_is_lost(seed: int, count: int) -> None:
    samples = image_samples(count, seed=seed)
    config = loading("uniform", seed=seed)
    batches = list(pack(samples, config, sequences_per_batch=2))
    keys: list[str] = []
    for batch in batches:
        batch.check()
        assert batch.patch_sizes is None
        assert batch.patches.shape[2] == 3 * batch.patch_size**2
        keys += batch.keys
        for key in batch.keys:
            size = ImageSize(*_native(samples[int(key)]))
            assert plan_image(key, size, config).patch_size == batch.patch_size
    assert sorted(keys) == [sample["key"] for sample in samples]


def _native(sample: dict[str, Any]) -> tuple[int, int]:
    header = sample["image"][16:24]  # of a PNG: width, then height
    return int.from_bytes(header[4:], "big"), int.from_bytes(header[:4], "big")


def test_uniform_batches_are_as_full_as_mixed_ones_but_for_the_last_of_each_size() -> None:
    samples = image_samples(300)
    waiting = {"seq_len": 48, "max_tokens": 24, "placement": Placement(window=24)}
    for mixing, ends in (("mixed", 1), ("uniform", 3)):
        batches = list(pack(samples, loading(mixing, **waiting), sequences_per_batch=2))
        full = sorted(batch.stats.padding for batch in batches)[: len(batches) - ends]
        assert len(full) >= 10
        assert float(np.mean(full)) < 0.02, mixing


@pytest.mark.parametrize("mixing", ["mixed", "uniform"])
@pytest.mark.parametrize(
    ("num_streams", "epochs"),
    [
        (1, 1),
        pytest.param(1, None, marks=pytest.mark.slow),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(3, None, marks=pytest.mark.slow),
    ],
)
def test_resuming_after_any_batch_is_bit_identical(
    tmp_path: Path, mixing: str, num_streams: int, epochs: int | None
) -> None:
    samples: list[dict[str, Any]] = image_samples(40)
    samples[5]["image"] = cut_png()
    shards = make_shards(tmp_path, samples, 10)
    options: dict[str, Any] = {"sequences_per_batch": 2, "shuffle_window": 5, "epochs": epochs}
    options["num_streams"] = num_streams
    config = loading(mixing, patch_sizes=RandomPatchSize(SIZES, (1, 1, 2)))

    def opened(state: LoaderState | None = None) -> PackedStream:
        return PackedStream(shards, config, **options, state=state)

    whole = drain(opened(), 14 if epochs is None else None)
    found = set().union(*map(patch_sizes_of, whole))
    assert found == set(SIZES) if epochs == 1 else len(found) > 1
    if mixing == "uniform":
        assert all(batch.patch_sizes is None for batch in whole)
        if epochs == 1:
            keys = [key.split("/")[-1] for batch in drain(opened()) for key in batch.keys]
            assert sorted(keys) == [s["key"] for i, s in enumerate(samples) if i != 5]
    state = LoaderState()
    for stop in range(len(whole) + 1):  # in a finite pass also while the last images are flushed
        if stop:
            state.update(whole[stop - 1])
        assert_same_batches(drain(opened(state), len(whole) - stop), whole[stop:])


def test_a_state_of_mixed_batches_is_refused_where_batches_are_uniform(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, image_samples(20), 10)
    state = LoaderState()
    state.update(next(iter(PackedStream(shards, loading("mixed"), sequences_per_batch=1))))
    with pytest.raises(ValueError, match="taken on other shards, or with another seed"):
        PackedStream(shards, loading("uniform"), sequences_per_batch=1, state=state)


def test_whoever_packs_one_batch_of_all_samples_refuses_uniform_batches() -> None:
    samples = image_samples(4)
    with pytest.raises(ValueError, match=r"PackingCollator needs patch_mixing=.mixed"):
        PackingCollator(loading("uniform"))
    with pytest.raises(ValueError, match=r"take PackedStream or packer\.pack"):
        PackedDataset(
            samples, [_native(s) for s in samples], loading("uniform"), sequences_per_batch=2
        )


def test_a_data_set_and_a_collator_mix_sizes_and_lose_no_image() -> None:
    samples = image_samples(40)
    config = loading("mixed", patch_sizes=RandomPatchSize(SIZES))
    packed = PackedDataset(
        samples,
        [_native(sample) for sample in samples],
        config,
        sequences_per_batch=2,
        keys=[sample["key"] for sample in samples],
    )
    for epoch in (0, 1):
        packed.set_epoch(epoch)
        batches = [packed[i] for i in range(len(packed))]
        assert sorted(key for batch in batches for key in batch.keys) == [
            sample["key"] for sample in samples
        ]
        assert all(not batch.stats.skipped for batch in batches)
        assert set().union(*map(patch_sizes_of, batches)) == set(SIZES)
    batch = PackingCollator(config)(samples)
    batch.check()
    assert batch.keys == tuple(sample["key"] for sample in samples)
    assert patch_sizes_of(batch) == set(SIZES)


def test_a_shown_plan_keeps_sizes_apart_where_batches_do() -> None:
    sizes = {}
    for mixing in ("mixed", "uniform"):
        plan = Show(config=loading(mixing, seq_len=2048)).plan()
        sizes[mixing] = [{image.patch_size for image in next(plan)} for _ in range(12)]
    assert all(len(found) == 1 for found in sizes["uniform"])
    assert any(len(found) > 1 for found in sizes["mixed"])
    mixed = list(islice(Show(config=loading("mixed", seq_len=2048)).plan(), 6))
    assert "patch" in plan_text(mixed, 2048).splitlines()[2].split()
