from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packer.config import PackerConfig
from packer.plan.balance import attention_cost, imbalance
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop, ResolutionDrop, ScheduledDrop
from packer.plan.epoch import EpochPlan, EpochPlanner, has_random_lengths, kept_lengths
from packer.plan.image import plan_image
from packer.plan.place import Placement
from packer.plan.resize import (
    FixedSide,
    Native,
    NoCrop,
    NormalArea,
    NormalSide,
    RandomCrop,
    UniformArea,
    UniformSide,
)
from packer.plan.simulate import laion_sizes
from packer.plan.types import ImageSize

RESOLUTIONS = (Native(), FixedSide(), UniformSide(), NormalSide(), UniformArea(), NormalArea())
DROPS = (
    NoDrop(),
    ConstantDrop(0.3),
    BetaDrop(),
    ResolutionDrop(),
    ScheduledDrop(midpoint=50, tau=-20),
    ScheduledDrop(midpoint=50, tau=20, maximum=0.9),
)


def planner(n: int = 300, **options: Any) -> EpochPlanner:
    sizes = laion_sizes(n).astype(np.int64)
    settings = {"patch_size": 16, "seq_len": 512, "max_tokens": 256, "token_drop": BetaDrop()}
    shape = {"shuffle": True, "ranks": 2, "per_rank": 3, "width": 384}
    own = {name: options.pop(name, value) for name, value in shape.items()}
    return EpochPlanner(sizes, np.arange(n), None, PackerConfig(**(settings | options)), **own)


def plan(planner: EpochPlanner, epoch: int) -> EpochPlan:
    return planner.deal(planner.place(epoch), planner.num_steps(planner.place(0)))


def batches(planner: EpochPlanner, epoch: int) -> list[list[list[int]]]:
    """Images of each sequence of each batch; batch g * ranks + r is step g's of rank r."""
    result = plan(planner, epoch)
    images = [
        result.order[result.placed[a:b]].tolist()
        for a, b in zip(result.bounds[:-1], result.bounds[1:], strict=True)
    ]
    return [images[i : i + planner.per_rank] for i in range(0, len(images), planner.per_rank)]


@given(
    resolution=st.sampled_from(RESOLUTIONS),
    drop=st.sampled_from(DROPS),
    crop=st.sampled_from([NoCrop(), RandomCrop()]),
    resize=st.sampled_from(["shrink_only", "allow_enlarge", "fill_budget"]),
    epoch=st.integers(0, 3),
    images_seen=st.integers(0, 200),
)
def test_lengths_are_those_of_the_plans_of_each_image(
    resolution: Any, drop: Any, crop: Any, resize: Any, epoch: int, images_seen: int
) -> None:
    config = PackerConfig(
        seq_len=400, resolution=resolution, token_drop=drop, crop=crop, resize=resize, seed=3
    )
    sizes = laion_sizes(40, seed=1).astype(np.int64)
    keys = [f"key {i}" for i in range(40)]
    seen = images_seen + np.arange(40)
    plans = [
        plan_image(key, ImageSize(*size), config, epoch=epoch, images_seen=number)
        for key, size, number in zip(keys, sizes.tolist(), seen.tolist(), strict=True)
    ]
    lengths = kept_lengths(keys, sizes, config, epoch=epoch, images_seen=seen)
    assert lengths.tolist() == [image.num_kept for image in plans]


@pytest.mark.parametrize("crop", [NoCrop(), RandomCrop()])
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_lengths_are_known_to_be_random_where_two_epochs_differ(
    resolution: Any, drop: Any, crop: Any
) -> None:
    config = PackerConfig(resolution=resolution, token_drop=drop, crop=crop)
    sizes = laion_sizes(60).astype(np.int64)
    keys = [str(i) for i in range(60)]
    epochs = [kept_lengths(keys, sizes, config, epoch=epoch) for epoch in (0, 1)]
    assert has_random_lengths(config) == (not np.array_equal(*epochs))


@given(
    n=st.integers(1, 120),
    ranks=st.integers(1, 4),
    per_rank=st.integers(1, 4),
    shuffle=st.booleans(),
    strategy=st.sampled_from(["exact", "best_fit", "first_fit", "next_fit"]),
    max_images=st.sampled_from([None, 2]),
    epoch=st.integers(0, 5),
)
def test_an_epoch_holds_every_image_once_in_sequences_that_fit(
    n: int, ranks: int, per_rank: int, shuffle: bool, strategy: Any, max_images: Any, epoch: int
) -> None:
    many = planner(
        n,
        shuffle=shuffle,
        ranks=ranks,
        per_rank=per_rank,
        placement=Placement(strategy),
        max_images_per_seq=max_images,
    )
    result, found = plan(many, epoch), batches(many, epoch)
    assert result.left_out == 0
    assert len(found) % ranks == 0
    flat = [image for batch in found for sequence in batch for image in sequence]
    assert sorted(flat) == list(range(n))
    place = {image: j for j, image in enumerate(result.order.tolist())}
    for batch in found:
        assert len(batch) == per_rank
        for sequence in batch:
            kept = [
                plan_image(
                    str(image),
                    ImageSize(*many.sizes[image].tolist()),
                    many.config,
                    epoch=epoch,
                    images_seen=epoch * n + place[image],
                ).num_kept
                for image in sequence
            ]
            assert sum(kept) <= 512
            assert max_images is None or len(sequence) <= max_images
    used = result.used_steps * ranks
    assert not any(any(batch) for batch in found[used:])


@settings(max_examples=25)
@given(n=st.integers(1, 200), ranks=st.integers(1, 4), per_rank=st.integers(2, 4))
def test_no_rank_is_idle_in_a_step_that_is_used(n: int, ranks: int, per_rank: int) -> None:
    """With a second step to take from; empty sequences are the last of their batch."""
    many = planner(n, ranks=ranks, per_rank=per_rank)
    result, found = plan(many, 0), batches(many, 0)
    used = found[: result.used_steps * ranks]
    if result.used_steps > 1:
        assert all(any(batch) for batch in used)
        full = used[: (result.used_steps - 2) * ranks]
        assert all(all(batch) for batch in full)
    for batch in found:
        filled = [bool(sequence) for sequence in batch]
        assert filled == sorted(filled, reverse=True)


def test_without_shuffle_the_epoch_keeps_the_order_and_with_it_each_has_its_own() -> None:
    assert plan(planner(shuffle=False), 3).order.tolist() == list(range(300))
    first, second = (plan(planner(), epoch).order.tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(300))
    assert first != second
    assert plan(planner(), 0).order.tolist() == first
    assert plan(planner(seed=1), 0).order.tolist() != first


def test_the_order_does_not_depend_on_an_images_length() -> None:
    many = planner(4000)
    order = many.place(0).order
    lengths = many.place(0).lengths
    assert abs(np.corrcoef(np.arange(4000), lengths)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


VARYING: list[dict[str, Any]] = [
    {},
    {"token_drop": NoDrop()},
    {"resolution": UniformSide(), "crop": RandomCrop()},
    {"max_images_per_seq": 2},
    {"placement": Placement("first_fit")},
    {"placement": Placement("next_fit"), "token_drop": NoDrop()},
    {"token_drop": ScheduledDrop(midpoint=3000, tau=-500, maximum=0.9)},
    {"token_drop": ScheduledDrop(midpoint=3000, tau=500)},
]


@pytest.mark.parametrize("options", VARYING, ids=str)
def test_there_is_room_for_every_epoch_and_little_more(options: dict[str, Any]) -> None:
    many = planner(400, **options)
    steps = many.num_steps(many.place(0))
    used = [many.deal(many.place(epoch), steps) for epoch in range(15)]
    assert [epoch.left_out for epoch in used] == [0] * 15
    assert steps <= 1.25 * max(epoch.used_steps for epoch in used) + 1


def test_no_step_is_spare_where_all_epochs_are_alike() -> None:
    many = planner(token_drop=ConstantDrop(0.3), shuffle=False)
    placed = many.place(0)
    assert many.num_steps(placed) == -(-len(placed.sequences) // 6)
    assert placed.sequences == many.place(7).sequences
    shuffled = replace(many, shuffle=True)
    assert shuffled.num_steps(shuffled.place(0)) <= many.num_steps(placed) + 1


def test_the_spare_share_shrinks_as_the_data_set_grows() -> None:
    many = planner(10_000, ranks=1, per_rank=1)
    placed = many.place(0)
    assert len(placed.sequences) < many.num_steps(placed) < 1.02 * len(placed.sequences)


def test_images_without_room_are_left_out_and_counted() -> None:
    many = planner()
    placed = many.place(0)
    result = many.deal(placed, 2)
    assert len(result.bounds) == 2 * 6 + 1
    held = result.placed[: result.bounds[-1]].tolist()
    assert (result.placed[result.bounds[-1] :] == -1).all()
    assert len(held) + result.left_out == 300
    assert sorted(held) == sorted(place for sequence in placed.sequences[:12] for place in sequence)


def test_a_schedule_sees_as_many_images_as_came_before() -> None:
    many = planner(token_drop=ScheduledDrop(midpoint=1000, tau=-300))
    totals = [int(many.place(epoch).lengths.sum()) for epoch in range(8)]
    assert totals == sorted(totals)
    assert totals[-1] > 2 * totals[0]
    assert many.images_seen(3, 7) == 907


def test_the_steps_of_an_epoch_are_balanced_over_the_ranks() -> None:
    many = planner(3000, ranks=4, per_rank=4)
    lengths = dict(zip(many.place(0).order.tolist(), many.place(0).lengths.tolist(), strict=True))

    def by_rank(found: list[list[list[int]]]) -> np.ndarray:
        costs = [
            sum(attention_cost([lengths[image] for image in sequence]) for sequence in batch)
            for batch in found
        ]
        return np.array(costs).reshape(-1, 4)

    balanced = by_rank(batches(many, 0))
    one = batches(replace(many, ranks=1), 0)
    in_order = by_rank(one[: len(one) // 4 * 4])
    full = plan(many, 0).used_steps - 2
    assert imbalance(balanced[:full]) < 0.2 * imbalance(in_order[:full])
    assert imbalance(balanced[:full]) < 0.002
