from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.evaluate.encode import read_metadata
from navit.evaluate.shape_baseline import nearest_vote, shape_baseline_accuracy, shape_baselines

Metadata = dict[str, dict[str, Any]]


def samples(part: str, shapes: list[tuple[int, int, str]], set_name: str = "s") -> Metadata:
    return {
        f"{part}/{i}": {"orig_width": w, "orig_height": h, "class_name": name, "set": set_name}
        for i, (w, h, name) in enumerate(shapes)
    }


def test_classes_that_differ_in_shape_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    sizes = {"wide": (400, 200), "tall": (200, 400), "big": (900, 900)}
    draw = [
        (int(w * rng.uniform(0.9, 1.1)), int(h * rng.uniform(0.9, 1.1)), name)
        for name, (w, h) in sizes.items()
        for _ in range(60)
    ]

    accuracy = shape_baseline_accuracy(
        samples("train", draw[::2]), samples("val", draw[1::2]), "s", k=5
    )

    assert accuracy == 1.0


def test_classes_of_one_shape_are_a_guess_at_the_largest() -> None:
    train = samples("train", [(300, 200, "a")] * 3 + [(300, 200, "b")] * 5)
    val = samples("val", [(300, 200, "a")] * 3 + [(300, 200, "b")])

    assert shape_baseline_accuracy(train, val, "s", k=1) == 0.25


@settings(deadline=None, max_examples=50)
@given(
    points=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    ),
    query=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    k=st.integers(1, 14),
)
def test_the_vote_includes_all_equally_near_points(
    points: list[tuple[int, int, int]], query: tuple[int, int], k: int
) -> None:
    gaps = [(x - query[0]) ** 2 + (y - query[1]) ** 2 for x, y, _ in points]
    reach = sorted(gaps)[min(k, len(points)) - 1]
    names = [name for _, _, name in points]
    voters = [name for name, gap in zip(names, gaps, strict=True) if gap <= reach]
    expected = min(set(names), key=lambda name: (-voters.count(name), -names.count(name), name))

    predicted = nearest_vote(
        np.array([(x, y) for x, y, _ in points], dtype=np.float64),
        np.array(names, dtype=np.int64),
        np.array([query], dtype=np.float64),
        k=k,
    )

    assert predicted.tolist() == [expected]


def test_validation_samples_never_vote() -> None:
    val = samples("val", [(100, 100, "a"), (500, 300, "b")])
    train = samples("train", [(110, 100, "b"), (500, 310, "a")])

    assert shape_baseline_accuracy(train | val, val, "s", k=1) == 0.0


def test_sets_are_apart_and_those_without_classes_or_sizes_are_left_out() -> None:
    train = samples("train", [(100, 100, "a"), (200, 100, "b")]) | samples(
        "other", [(200, 100, "x")], "t"
    )
    val = samples("val", [(200, 100, "b")]) | {
        "val/u": {"set": "u", "class_name": "x", "orig_width": 5, "orig_height": 5},
        "val/v": {"set": "s", "class_name": "a"},
        "val/w": {"set": "s", "class_name": None, "orig_width": 5, "orig_height": 5},
        "val/x": {"set": "t", "class_name": "x", "width": 5, "height": 5},
    }

    assert shape_baselines(train, val, k=1) == {
        "s/shape_accuracy@1": 1.0,
        "t/shape_accuracy@1": 1.0,
    }
    assert shape_baseline_accuracy(train, {}, "s") is None
    assert shape_baselines({}, {}) == {}


def test_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match="k must be positive"):
        shape_baseline_accuracy({}, {}, "s", k=0)


def test_shape_alone_gives_about_nine_percent_on_caltech() -> None:
    """Native aspect leaks class: chance is 1 %."""
    data = Path(__file__).parents[3] / "shared" / "data"
    train = sorted(data.glob("pairs-train-*.tar"))
    if not train:
        pytest.skip("the real pairs are not on this machine")

    accuracy = shape_baselines(read_metadata(train), read_metadata([data / "pairs-val-00000.tar"]))

    assert accuracy["caltech101/shape_accuracy@1"] == pytest.approx(0.09, abs=0.02)
