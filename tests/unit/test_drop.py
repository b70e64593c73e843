import math
from statistics import fmean, pstdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer.plan.draws import keyed_draws
from packer.plan.drop import (
    BetaDrop,
    ConstantDrop,
    NoDrop,
    ResolutionDrop,
    ScheduledDrop,
    kept_indices,
    num_kept_tokens,
)

draws = st.integers(0, 2**64 - 1)


@given(st.integers(1, 2000), draws, st.data())
def test_kept_indices_are_rising_unique_and_inside(n: int, draw: int, data: st.DataObject) -> None:
    num_kept = data.draw(st.integers(1, n))

    kept = kept_indices(n, num_kept, draw)

    assert kept.dtype == np.int64
    assert len(kept) == num_kept
    assert (np.diff(kept) > 0).all()
    assert kept[0] >= 0
    assert kept[-1] < n


def test_every_token_is_kept_equally_often_and_independently_of_its_neighbour() -> None:
    counts, both = np.zeros(40), 0
    for i in range(4000):
        kept = kept_indices(40, 10, keyed_draws(0, 0, str(i)).kept)
        counts[kept] += 1
        both += {3, 4} <= set(kept.tolist())

    # Binomial(4000, 1/4): standard deviation 27.
    assert np.abs(counts - 1000).max() < 130
    assert both / 4000 == pytest.approx(0.25 * 9 / 39, abs=0.015)


def test_kept_indices_of_a_draw_are_fixed_for_ever() -> None:
    """A literal: another numpy must not change which tokens a stored run kept."""
    assert kept_indices(12, 5, 2024).tolist() == [1, 5, 6, 7, 9]


@pytest.mark.parametrize(
    ("n", "rate", "kept"),
    [(10, 0.0, 10), (10, 0.25, 8), (10, 0.99, 1), (1, 0.9, 1), (256, 0.5, 128)],
)
def test_kept_is_n_less_the_floor_of_the_share(n: int, rate: float, kept: int) -> None:
    assert num_kept_tokens(n, rate) == kept


@pytest.mark.parametrize(
    ("maximum", "mean", "below"),
    [(0.4, 0.10, 0.603), (0.4, 0.25, 0.115), (0.4, 0.35, 0.013), (0.9, 0.50, 0.059)],
)
def test_beta_drop_has_the_papers_share_below_one_tenth(
    maximum: float, mean: float, below: float
) -> None:
    """P(d < 0.1) read off NaViT's Figure 15a, to within one point."""
    drop = BetaDrop(mean, maximum)

    rates = [drop.rate(256, keyed_draws(0, 0, str(i)).drop_rate) for i in range(30_000)]

    assert fmean(rate < 0.1 for rate in rates) == pytest.approx(below, abs=0.01)
    assert fmean(rates) == pytest.approx(mean, abs=0.003)
    # Var u = 0.3 u_mean (1 - u_mean)
    u_mean = mean / maximum
    assert np.var(rates) / maximum**2 == pytest.approx(0.3 * u_mean * (1 - u_mean), rel=0.05)
    assert max(rates) <= maximum


@given(st.integers(2, 500), draws, st.data())
def test_keeping_more_tokens_keeps_those_of_before(n: int, draw: int, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(1, n - 1))
    more = data.draw(st.integers(fewer, n))
    assert set(kept_indices(n, fewer, draw)) <= set(kept_indices(n, more, draw))


@pytest.mark.parametrize(
    ("num_tokens", "mean"), [(16, 0.1), (4, 0.1), (520, 0.3), (1024, 0.5), (5000, 0.5)]
)
def test_resolution_drop_is_a_narrow_normal_around_a_mean_linear_in_length(
    num_tokens: int, mean: float
) -> None:
    """NaViT appendix B.6: std 0.02, cut at two of it, which leaves 0.8796 of the deviation."""
    drop = ResolutionDrop(low=0.1, high=0.5, min_tokens=16, max_tokens=1024)

    rates = [drop.rate(num_tokens, keyed_draws(0, 0, str(i)).drop_rate) for i in range(20_000)]

    assert fmean(rates) == pytest.approx(mean, abs=0.001)
    assert pstdev(rates) == pytest.approx(0.8796 * 0.02, rel=0.03)
    assert mean - 0.04 - 1e-9 <= min(rates) < mean - 0.039
    assert mean + 0.039 < max(rates) <= mean + 0.04 + 1e-9


@given(draws, st.integers(1, 5000))
def test_a_resolution_drop_may_fall_and_never_goes_below_zero(draw: int, n: int) -> None:
    drop = ResolutionDrop(low=0.6, high=0.0, min_tokens=1, max_tokens=900)
    assert 0 <= drop.rate(n, draw) <= 0.64
    assert drop.rate(899, draw) <= 0.042


def schedule(n: float, low: float, high: float, mu: float, tau: float) -> float:
    """NaViT appendix B.7, as printed there."""
    return low + (high - low) / (1 + math.exp(min(-(n - mu) / tau, 700)))


@given(
    n=st.integers(0, 10**9),
    mu=st.floats(0, 1e9),
    tau=st.floats(1e6, 1e9),
    down=st.booleans(),
)
def test_scheduled_drop_follows_the_papers_sigmoid(
    n: int, mu: float, tau: float, down: bool
) -> None:
    tau = -tau if down else tau
    drop = ScheduledDrop(midpoint=mu, tau=tau, low=0.2, high=0.8)

    assert drop.rate(100, 7, n) == pytest.approx(schedule(n, 0.2, 0.8, mu, tau), abs=1e-9)
    assert 0.2 <= drop.rate(100, 7, n) <= 0.8


def test_a_schedule_rises_falls_or_stays() -> None:
    seen = range(0, 100_000, 5_000)
    up = [ScheduledDrop(50_000, 10_000).rate(64, 0, n) for n in seen]
    down = [ScheduledDrop(50_000, -10_000).rate(64, 0, n) for n in seen]
    level = [ScheduledDrop(50_000, 10_000, low=0.4, high=0.4).rate(64, 0, n) for n in seen]
    assert up == sorted(up)
    assert up[0] == pytest.approx(0.204, abs=1e-3)
    assert up[-1] == pytest.approx(0.793, abs=1e-3)
    assert [a + b for a, b in zip(up, down, strict=True)] == pytest.approx([1.0] * 20)
    assert set(level) == {0.4}
    # Steps far beyond what exp can hold.
    assert ScheduledDrop(0.0, 1e-3).rate(64, 0, 10**9) == 0.8
    assert ScheduledDrop(1e9, 1e-3).rate(64, 0, 0) == pytest.approx(0.2)


@pytest.mark.parametrize(("images_seen", "mean"), [(0, 0.7), (50_000, 0.45), (10**6, 0.2)])
def test_a_schedule_may_move_the_mean_of_a_beta_distribution(images_seen: int, mean: float) -> None:
    drop = ScheduledDrop(50_000, -10_000, low=0.2, high=0.7, maximum=0.9)

    rates = [drop.rate(64, keyed_draws(0, 0, str(i)).drop_rate, images_seen) for i in range(20_000)]

    assert fmean(rates) == pytest.approx(mean, abs=0.008)
    assert np.var(rates) / 0.81 == pytest.approx(0.3 * mean / 0.9 * (1 - mean / 0.9), rel=0.06)
    assert max(rates) <= 0.9


def test_only_a_schedule_looks_at_the_images_seen() -> None:
    for drop in (NoDrop(), ConstantDrop(0.3), BetaDrop(), ResolutionDrop()):
        assert drop.rate(300, 99, 10**9) == drop.rate(300, 99)


@given(draws, st.integers(1, 5000))
def test_constant_and_no_drop_draw_nothing(draw: int, n: int) -> None:
    assert NoDrop().rate(n, draw) == 0
    assert ConstantDrop(0.3).rate(n, draw) == 0.3


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantDrop(1.0),
        lambda: ConstantDrop(-0.1),
        lambda: BetaDrop(0.5, 0.4),
        lambda: BetaDrop(0.5, 1.0),
        lambda: BetaDrop(0.0, 0.5),
        lambda: ResolutionDrop(low=-0.1),
        lambda: ResolutionDrop(high=0.97),
        lambda: ResolutionDrop(std=0.0),
        lambda: ResolutionDrop(min_tokens=64, max_tokens=64),
        lambda: ScheduledDrop(0, 0),
        lambda: ScheduledDrop(0, 1, low=0.8, high=0.2),
        lambda: ScheduledDrop(0, 1, high=1.0),
        lambda: ScheduledDrop(0, 1, maximum=0.8),
        lambda: ScheduledDrop(0, 1, low=0.0, maximum=0.9),
    ],
)
def test_rates_that_leave_nothing_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="got"):
        make()  # type: ignore[operator]
