import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from navit.evaluate.ridge import Moments


def by_least_squares(
    x: np.ndarray, classes: np.ndarray, num_classes: int, strength: float, queries: np.ndarray
) -> np.ndarray:
    """Plain twin: standardise, centre the targets, and solve the stacked least-squares problem."""
    targets = np.where(classes[:, None] == np.arange(num_classes), 1.0, -1.0)
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-9, std, np.inf)
    z = (x - mean) / std
    rows = np.concatenate([z / len(x) ** 0.5, strength**0.5 * np.eye(x.shape[1])])
    right = np.concatenate(
        [(targets - targets.mean(0)) / len(x) ** 0.5, np.zeros((x.shape[1], num_classes))]
    )
    weight = np.linalg.lstsq(rows, right, rcond=None)[0]
    return (queries - mean) / std @ weight + targets.mean(0)


@given(
    seed=st.integers(0, 999),
    count=st.integers(2, 30),
    dim=st.integers(1, 8),
    num_classes=st.integers(1, 4),
    strength=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    constant=st.booleans(),
)
def test_sums_over_a_stream_solve_the_regression(
    seed: int, count: int, dim: int, num_classes: int, strength: float, constant: bool
) -> None:
    """In parts, with a class that only comes late and a feature that may say nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dim)) * rng.uniform(0.1, 100, dim) + rng.normal(size=dim)
    if constant:
        x[:, 0] = 7.25
    classes = np.sort(rng.integers(0, num_classes, count))
    queries = rng.normal(size=(5, dim))
    moments = Moments(dim)
    for part in np.array_split(np.arange(count), 3):
        moments.add(torch.from_numpy(x[part]), torch.from_numpy(classes[part]))

    other, solved = moments.solve([2.0, strength])

    expected = by_least_squares(x, classes, int(classes.max()) + 1, strength, queries)
    found = solved.scores(torch.from_numpy(queries)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * (1 + np.abs(expected).max()))
    assert (other.strength, solved.strength) == (2.0, strength)


def test_a_class_without_vectors_is_never_first() -> None:
    moments = Moments(2)
    moments.add(torch.randn(6, 2), torch.tensor([0, 3, 0, 3, 0, 3]))

    scores = moments.solve([0.1])[0].scores(torch.randn(50, 2) * 10)

    torch.testing.assert_close(scores[:, 1:3], torch.full((50, 2), -1.0, dtype=torch.float64))
    assert set(scores.argmax(1).tolist()) <= {0, 3}


def test_wrong_use_is_named() -> None:
    moments = Moments(2)
    with pytest.raises(ValueError, match="at least one labelled vector"):
        moments.solve([1.0])
    moments.add(torch.randn(3, 2), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="must be positive"):
        moments.solve([1.0, 0.0])
