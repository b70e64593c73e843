"""Placement: each image once, no limit exceeded, nothing waits for ever, little padding."""

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packer.config import PackerConfig
from packer.plan.place import Placement, Placer, pack_lengths
from packer.plan.resize import UniformSide
from packer.plan.simulate import laion_lengths
from packer.plan.subset_sum import fullest_subset, longest_single
from tests.reference import placement as reference

STRATEGIES = ("exact", "best_fit", "first_fit", "next_fit")
PLACEMENTS = st.builds(
    Placement,
    strategy=st.sampled_from(STRATEGIES),
    window=st.integers(1, 20),
    max_age=st.integers(1, 40),
    open_sequences=st.integers(1, 6),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of up to 150 images and a sequence length that fits them."""
    seq_len = draw(st.integers(1, 60))
    longest = draw(st.integers(1, seq_len))
    return draw(st.lists(st.integers(1, longest), max_size=150)), seq_len


def push_all(placer: Placer[int], lengths: Sequence[int], start: int = 0) -> list[list[int]]:
    return [
        sequence
        for index, length in enumerate(lengths, start)
        for sequence in placer.push(length, index)
    ]


def padding(lengths: Sequence[int] | np.ndarray, sequences: list[list[int]], seq_len: int) -> float:
    return 1 - int(np.sum(lengths)) / (seq_len * len(sequences))


@pytest.fixture
def unchecked_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong types reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@given(stream=streams(), placement=PLACEMENTS, max_images=st.none() | st.integers(1, 8))
@settings(deadline=None)
def test_every_image_is_placed_once_within_both_limits(
    stream: tuple[list[int], int], placement: Placement, max_images: int | None
) -> None:
    lengths, seq_len = stream
    placer = Placer[int](seq_len, placement=placement, max_images=max_images)

    sequences = push_all(placer, lengths)
    sequences += placer.flush()

    assert sorted(chain.from_iterable(sequences)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in sequence) <= seq_len for sequence in sequences)
    assert max_images is None or all(len(sequence) <= max_images for sequence in sequences)
    assert all(sequence == sorted(sequence) for sequence in sequences)
    assert placer.pending == []
    assert placer.flush() == []


@given(stream=streams(), placement=PLACEMENTS, max_images=st.none() | st.integers(1, 8))
@settings(deadline=None)
def test_pack_lengths_equals_pushing_one_by_one(
    stream: tuple[list[int], int], placement: Placement, max_images: int | None
) -> None:
    lengths, seq_len = stream
    placer = Placer[int](seq_len, placement=placement, max_images=max_images)
    options = {name: getattr(placement, name) for name in ("window", "max_age", "open_sequences")}

    packed = pack_lengths(
        lengths, seq_len, strategy=placement.strategy, max_images=max_images, **options
    )

    assert packed == push_all(placer, lengths) + placer.flush()
    assert packed == pack_lengths(
        np.array(lengths, dtype=np.int32),
        seq_len,
        strategy=placement.strategy,
        max_images=max_images,
        **options,
    )


@given(
    stream=streams(),
    placement=PLACEMENTS,
    max_images=st.none() | st.integers(1, 8),
    stop=st.integers(0, 150),
    used=st.booleans(),
)
@settings(deadline=None)
def test_a_restored_placer_continues_as_if_never_stopped(
    stream: tuple[list[int], int],
    placement: Placement,
    max_images: int | None,
    stop: int,
    used: bool,
) -> None:
    """The state survives json, whatever the placer it is restored into did before."""
    lengths, seq_len = stream
    placer = Placer[int](seq_len, placement=placement, max_images=max_images)
    push_all(placer, lengths[:stop])
    other = Placer[Any](seq_len, placement=placement, max_images=max_images)
    if used:
        other.push(1, "forgotten")

    other.restore(json.loads(json.dumps(placer.snapshot())))

    assert other.pending == placer.pending
    for index, length in enumerate(lengths[stop:], stop):
        assert other.push(length, index) == placer.push(length, index)
        assert other.snapshot() == placer.snapshot()
    assert other.flush() == placer.flush()


@given(
    seed=st.integers(0, 999),
    window=st.integers(4, 30),
    max_age=st.integers(1, 80),
    max_images=st.none() | st.integers(1, 4),
    kind=st.sampled_from(["mixed", "long", "rare"]),
)
@settings(deadline=None, max_examples=60)
def test_no_image_waits_longer_than_age_limit_plus_window(
    seed: int, window: int, max_age: int, max_images: int | None, kind: str
) -> None:
    """Images over L / 2 in number, and rare full ones among fillers, are where greed starves."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(*{"mixed": (16, 65), "long": (33, 64), "rare": (16, 20)}[kind], 600)
    if kind == "rare":
        lengths[::17] = 61
    placer = Placer[int](64, placement=Placement("exact", window, max_age), max_images=max_images)

    for now, length in enumerate(lengths.tolist()):
        for sequence in placer.push(length, now):
            assert now - sequence[0] <= max_age + window
        assert len(placer.pending) < max(window, 8)


def test_age_alone_never_closes_a_sequence_that_newer_images_can_fill() -> None:
    placer = Placer[int](8192, placement=Placement("exact", window=16, max_age=32))
    sequences = push_all(placer, [2] * 20_000)
    assert {2 * len(sequence) for sequence in sequences} == {8192}


@given(
    lengths=st.lists(st.integers(1, 30), max_size=10),
    target=st.integers(1, 60),
    max_items=st.none() | st.integers(1, 5),
)
@settings(deadline=None)
def test_the_subset_is_as_full_as_the_best_of_all_subsets(
    lengths: list[int], target: int, max_items: int | None
) -> None:
    chosen = fullest_subset(lengths, target, max_items)
    assert chosen == sorted(set(chosen))
    assert max_items is None or len(chosen) <= max_items
    best = reference.fullest_sum(lengths, target, max_items)
    assert sum(lengths[position] for position in chosen) == best


@given(lengths=st.lists(st.integers(5, 30), max_size=12), target=st.integers(1, 40))
@settings(deadline=None)
def test_where_no_two_fit_the_longest_single_is_the_fullest_subset(
    lengths: list[int], target: int
) -> None:
    target = min(target, 2 * min(lengths, default=20) - 1)
    assert longest_single(lengths, target) == fullest_subset(lengths, target)


def test_among_equally_full_subsets_the_oldest_images_are_chosen() -> None:
    assert fullest_subset([3, 4, 5, 2, 7], 7) == [0, 1]
    assert fullest_subset([3, 4, 5, 2, 7], 7, max_items=1) == [4]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), data=st.data())
@settings(deadline=None)
def test_exact_fills_a_sequence_as_full_as_trying_every_subset(
    lengths: list[int], data: st.DataObject
) -> None:
    seq_len = data.draw(st.integers(max(lengths), 80))
    first = pack_lengths(lengths, seq_len)[0]
    best = reference.fullest_front(lengths, seq_len, first_tried=8)
    assert sum(lengths[index] for index in first) == best


@given(stream=streams(), max_images=st.integers(1, 8))
@settings(deadline=None)
def test_greedy_strategies_equal_their_plain_twins(
    stream: tuple[list[int], int], max_images: int
) -> None:
    """With sequences enough to keep open, and as sets: ours come out in order of closing."""
    lengths, seq_len = stream
    for strategy, twin in (("first_fit", reference.first_fit), ("best_fit", reference.best_fit)):
        ours = pack_lengths(
            lengths, seq_len, strategy=strategy, max_images=max_images, open_sequences=200
        )
        assert sorted(ours) == sorted(twin(lengths, seq_len, max_images))
    assert pack_lengths(lengths, seq_len, strategy="next_fit") == reference.next_fit(
        lengths, seq_len
    )


def test_first_and_best_fit_choose_differently() -> None:
    lengths = [6, 7, 3, 4]
    assert sorted(pack_lengths(lengths, 10, strategy="first_fit")) == [[0, 2], [1], [3]]
    assert sorted(pack_lengths(lengths, 10, strategy="best_fit")) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("seq_len", "limit"), [(256, 3e-4), (1024, None), (4096, None)])
def test_exact_leaves_almost_no_padding_on_web_images(seq_len: int, limit: float | None) -> None:
    check_padding(50_000, seq_len, limit)


@pytest.mark.slow
@pytest.mark.parametrize(("seq_len", "limit"), [(256, 3e-4), (1024, None), (4096, None)])
def test_exact_leaves_almost_no_padding_on_200_000_web_images(
    seq_len: int, limit: float | None
) -> None:
    check_padding(200_000, seq_len, limit)


def check_padding(n: int, seq_len: int, limit: float | None) -> None:
    lengths = laion_lengths(n, PackerConfig(seq_len=seq_len), beta=(5, 5))
    found = padding(lengths, pack_lengths(lengths, seq_len), seq_len)
    bound = padding(lengths, [[]] * -(-int(lengths.sum()) // seq_len), seq_len)
    assert found <= (bound + 1e-4 if limit is None else limit)


def test_exact_leaves_at_most_one_percent_in_the_papers_setting() -> None:
    """Sides U(64, 256), L = 256, no dropping (NaViT section 3): first fit leaves 5.9 %."""
    config = PackerConfig(
        seq_len=256, resolution=UniformSide(64.0, 256.0), resize="allow_enlarge", patch_size=16
    )
    lengths = laion_lengths(20_000, config)
    assert padding(lengths, pack_lengths(lengths, 256), 256) <= 0.01


@pytest.mark.parametrize("max_images", [6, 8])
def test_a_limit_on_images_costs_little_padding(max_images: int) -> None:
    lengths = laion_lengths(20_000, PackerConfig(seq_len=1024), beta=(5, 5))
    assert padding(lengths, pack_lengths(lengths, 1024, max_images=max_images), 1024) <= 3e-4


@pytest.mark.parametrize(
    ("lengths", "kwargs", "message"),
    [
        ([3, 0], {}, r"lengths\[1\] = 0"),
        ([3, 4, 11], {}, r"seq_len \(10\); got lengths\[2\] = 11"),
        ([3.5], {}, "integers"),
        ([[3]], {}, "flat"),
        ([3], {"strategy": "worst_fit"}, "'exact', 'best_fit', 'first_fit', 'next_fit'"),
        ([3], {"windows": 3}, "window, max_age, open_sequences; got 'windows'"),
        ([3], {"window": 0}, "window must be a positive integer; got 0"),
        ([3], {"max_images": 0}, "max_images must be a positive integer"),
    ],
)
def test_wrong_lengths_and_settings_are_refused(
    lengths: list[Any], kwargs: dict[str, Any], message: str, unchecked_types: None
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_lengths(np.array(lengths), 10, **kwargs)


def test_a_refused_push_leaves_the_placer_as_it_was() -> None:
    placer = Placer[str](10)
    placer.push(3, "a")
    with pytest.raises(ValueError, match=r"seq_len \(10\); got 11 for 'b'"):
        placer.push(11, "b")
    assert placer.snapshot() == [("a", 3, 0, -1)]


@pytest.mark.parametrize(
    "rows",
    [
        [("a", 3, 0, -1), ("b", 3, 1, -1)],
        [("a", 3, 1, -1), ("b", 3, 1, -1)],
        [("a", 3, -1, -1)],
        [("a", 11, 0, -1)],
        [("a", 3, 0, 0)],
    ],
    ids=["newest first", "equal ages", "negative age", "too long", "of a greedy strategy"],
)
def test_rows_of_another_placer_are_refused(rows: list[tuple[str, int, int, int]]) -> None:
    placer = Placer[str](10)
    placer.push(2, "kept")
    with pytest.raises(ValueError, match="same strategy and seq_len"):
        placer.restore(rows)
    assert placer.snapshot() == [("kept", 2, 0, -1)]
