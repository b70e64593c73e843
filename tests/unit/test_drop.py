from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer.plan.draws import keyed_draws
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop, kept_indices, num_kept_tokens

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
    ],
)
def test_rates_that_leave_nothing_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="got"):
        make()  # type: ignore[operator]
