from statistics import NormalDist, fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer.plan.draws import keyed_draws, keyed_draws_many, truncated_normal, uniform


@given(st.integers(0, 5), st.integers(0, 5), st.text(max_size=20))
def test_the_same_seed_epoch_and_key_give_the_same_draws(seed: int, epoch: int, key: str) -> None:
    draws = keyed_draws(seed, epoch, key)

    assert draws == keyed_draws(seed, epoch, key)
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 2**64 for draw in draws)


@given(st.integers(0, 5), st.integers(0, 5), st.lists(st.text(max_size=20), max_size=5))
def test_many_keys_are_drawn_for_as_one_by_one(seed: int, epoch: int, keys: list[str]) -> None:
    draws = keyed_draws_many(seed, epoch, keys)
    assert draws.tolist() == [list(keyed_draws(seed, epoch, key)) for key in keys]


def test_seed_epoch_and_key_all_change_every_draw() -> None:
    base = keyed_draws(0, 0, "a")

    for other in (keyed_draws(1, 0, "a"), keyed_draws(0, 1, "a"), keyed_draws(0, 0, "b")):
        assert all(x != y for x, y in zip(base, other, strict=True))


def test_a_key_that_is_not_valid_unicode_is_drawn_for_like_any_other() -> None:
    assert keyed_draws(0, 0, "broken \udcff name") != keyed_draws(0, 0, "broken name")


def test_uniform_covers_the_unit_interval_evenly() -> None:
    values = [uniform(keyed_draws(0, 0, str(i)).resolution) for i in range(20_000)]

    assert 0 <= min(values) < 0.001
    assert 0.999 < max(values) < 1
    assert fmean(values) == pytest.approx(0.5, abs=0.01)
    assert fmean(v < 0.1 for v in values) == pytest.approx(0.1, abs=0.01)


def test_truncated_normal_has_the_quantiles_of_its_formula() -> None:
    """P(x < 0) of N(-0.5, 1) truncated to [-1, 1], from the normal's distribution function."""
    cdf = NormalDist(-0.5, 1).cdf
    expected = (cdf(0) - cdf(-1)) / (cdf(1) - cdf(-1))
    draws = [keyed_draws(0, 0, str(i)).resolution for i in range(20_000)]

    values = [truncated_normal(draw, -0.5, 1, -1, 1) for draw in draws]

    assert fmean(v < 0 for v in values) == pytest.approx(expected, abs=0.01)
    assert min(values) >= -1
    assert max(values) <= 1


@given(st.integers(0, 2**64 - 1), st.floats(-50, 50), st.floats(0.01, 5))
def test_truncated_normal_stays_in_its_range_however_far_the_mean(
    draw: int, mean: float, std: float
) -> None:
    assert -1 <= truncated_normal(draw, mean, std, -1, 1) <= 1
