"""The plots of a report: what is drawn is what was recorded."""

from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from navit.report.curves import (
    HEIGHT,
    WIDTH,
    Line,
    Scale,
    draw_curves,
    log_ticks,
    smooth,
    thin,
    ticks,
)
from navit.report.looks import Look, look_of, short, write, write_hours

finite = st.floats(-1e6, 1e6, allow_subnormal=False)


def line(values: list[float], run: int = 0, name: str = "run") -> Line:
    steps = np.arange(1, len(values) + 1, dtype=float)
    return Line(run, name, steps, steps, np.array(values, float))


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def points(polyline: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = polyline.attrib["points"].split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


@given(low=finite, span=st.floats(1e-6, 1e6), count=st.integers(1, 8))
def test_ticks_are_round_inside_and_not_too_many(low: float, span: float, count: int) -> None:
    high = low + span
    if high <= low:
        return
    found = ticks(low, high, count)
    assert found == sorted(found)
    assert len(found) <= 2.5 * count + 2
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)


@given(low=st.floats(1e-9, 1e6), ratio=st.floats(20, 1e9))
def test_ticks_of_a_logarithmic_axis_are_inside(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert 1 <= len(found) <= 13
    assert all(low <= value <= low * ratio for value in found)


def test_a_scale_is_linear_or_logarithmic_between_its_ends() -> None:
    assert Scale(0, 10, 100, 200)(np.array([0.0, 5.0, 10.0])).tolist() == [100, 150, 200]
    log = Scale(1, 100, 0, 10, log=True)
    np.testing.assert_allclose(log(np.array([1.0, 10.0, 100.0])), [0, 5, 10])


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=3000), count=st.integers(1, 50))
def test_thinning_keeps_ends_and_extremes(values: list[float], count: int) -> None:
    ys = np.array(values)
    xs = np.arange(len(ys), dtype=float)
    kept_x, kept_y = thin(xs, ys, count)
    assert len(kept_x) <= 2 * count + 2
    assert kept_x[0] == 0
    assert kept_x[-1] == len(ys) - 1
    assert kept_y.min() == ys.min()
    assert kept_y.max() == ys.max()
    np.testing.assert_array_equal(kept_y, ys[kept_x.astype(int)])


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_smoothing_is_an_average_of_neighbours(values: list[float]) -> None:
    ys = np.array(values)
    found = smooth(ys)
    assert found.shape == ys.shape
    assert np.all(found <= ys.max() + 1e-9)
    assert np.all(found >= ys.min() - 1e-9)
    np.testing.assert_allclose(smooth(np.full(len(ys), 3.0)), 3.0)


@given(runs=st.lists(st.lists(finite, min_size=1, max_size=30), min_size=1, max_size=4))
def test_every_point_of_every_run_is_inside_the_picture(runs: list[list[float]]) -> None:
    lines = [line(values, i, f"run {i}") for i, values in enumerate(runs)]
    svg = parse(draw_curves(lines, Look("Quantity"), "step", dots=True))
    groups = [g for g in svg.iter("g") if g.attrib["class"].startswith("run-")]
    assert [g.attrib["class"] for g in groups] == [f"run-{i}" for i in range(len(runs))]
    for group, values in zip(groups, runs, strict=True):
        drawn = points(next(group.iter("polyline")))
        assert len(drawn) == len(values)
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in drawn)
        assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
        titles = [t.text for t in group.iter("title")]
        assert len(titles) == len(values)


def test_a_larger_value_stands_higher_and_says_itself() -> None:
    svg = parse(draw_curves([line([0.1, 0.4])], look_of("accuracy"), "step", dots=True))
    (_, first), (_, second) = points(next(svg.iter("polyline")))
    assert second < first
    assert [t.text for t in svg.iter("title")] == ["run, step 1: 10.0 %", "run, step 2: 40.0 %"]


def test_a_spike_does_not_flatten_the_loss() -> None:
    values = [3.0] * 400 + [1000.0] + [2.0] * 400
    svg = parse(draw_curves([line(values)], look_of("loss"), "step"))
    raw = next(p for p in svg.iter("polyline") if p.attrib["class"] == "raw")
    ys = [y for _, y in points(raw)]
    assert max(ys) - sorted(ys)[1] > 0.5 * HEIGHT, "the fall from 3 to 2 fills the picture"


def test_chance_is_drawn_and_named() -> None:
    svg = draw_curves(
        [line([0.2, 0.3])], look_of("accuracy"), "step", references={"chance <1>": 0.01}
    )
    assert [t.text for t in parse(svg).iter("text")][-1] == "chance <1>"


@pytest.mark.parametrize(
    ("hours", "title"),
    [(0.01, "seconds of steps"), (0.5, "minutes of steps"), (30.0, "hours of steps")],
)
def test_the_axis_of_time_takes_a_unit_that_can_be_read(hours: float, title: str) -> None:
    steps = np.array([1.0, 2.0])
    found = Line(0, "run", steps, steps * hours / 2, np.array([1.0, 2.0]))
    svg = draw_curves([found], Look("Quantity"), "hours")
    assert title in [t.text for t in parse(svg).iter("text")]


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [5.0, 5.0], [-1.0], [1e-300, 1e300]])
def test_constant_and_extreme_values_are_drawn(values: list[float]) -> None:
    for look in (Look("Quantity"), Look("Share", "share", from_zero=True), look_of("loss")):
        assert "nan" not in draw_curves([line(values)], look, "step")


def test_a_plot_without_a_point_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one line with a point"):
        draw_curves([], Look("Quantity"), "step")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.2125, "21.2 %"),
        ("padding", 0.000018, "0.0018 %"),
        ("padding", 0.0, "0 %"),
        ("loss", 1.23456, "1.235"),
        ("lr", 0.00031, "3.10e-4"),
        ("tokens_per_second", 14573.2, "14,573"),
        ("peak_memory_bytes", 3 * 2**30, "3.00 GiB"),
        ("anything_new", float("nan"), "\u2013"),
    ],
)
def test_values_are_written_with_their_unit(name: str, value: float, text: str) -> None:
    assert write(value, look_of(name).unit) == text


def test_numbers_on_axes_are_short() -> None:
    assert [short(v) for v in (0.0, 0.25, 5000.0, 20_000.0, 1.5e6)] == [
        "0", "0.25", "5,000", "20 k", "1.5 M",
    ]  # fmt: skip
    assert [write_hours(v) for v in (0.001, 0.1, 2.5)] == ["4 s", "6.0 min", "2.50 h"]
