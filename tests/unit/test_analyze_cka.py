"""Linear CKA: its invariances, and its estimator against the U-statistic it stands for."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.analyze import MinibatchCka, linear_cka
from navit.analyze.cka import unbiased_hsic


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """Average h over all ordered quadruples of different images: the U-statistic of HSIC."""
    a, b = k.tolist(), l.tolist()
    values = [
        a[i][j] * (b[i][j] + b[q][r] - 2 * b[i][q]) for i, j, q, r in permutations(range(len(a)), 4)
    ]
    return sum(values) / len(values)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(4, 7), seed=st.integers(0, 1000))
def test_the_estimator_is_the_u_statistic_over_all_quadruples(n: int, seed: int) -> None:
    x, y = normal(n, 3, seed=seed), normal(n, 2, seed=seed + 1)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert float(unbiased_hsic(k, l)) == pytest.approx(plain_hsic(k, l), abs=1e-9)


def test_the_mean_over_minibatches_is_the_estimate_of_all_images_within_its_error() -> None:
    x = normal(240, 6, seed=2)
    y = x[:, :4] @ normal(4, 5, seed=3) + normal(240, 5, seed=4)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    whole = float(unbiased_hsic(k, l))
    found = []
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        order = torch.randperm(240, generator=generator)
        for part in order.split(8):
            found.append(float(unbiased_hsic(k[part][:, part], l[part][:, part])))
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - whole) < 3 * error < 0.1 * whole
    # The usual estimate, trace(K H L H) / (n - 1)^2, is far off at 8 images: the test can fail.
    centre = torch.eye(8, dtype=torch.float64) - 1 / 8
    biased = [
        float(torch.trace(k[p][:, p] @ centre @ l[p][:, p] @ centre)) / 49
        for p in torch.arange(240).split(8)
    ]
    assert abs(np.mean(biased) - whole) > 10 * error


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_a_representation_equals_itself_rotated_scaled_and_shifted(seed: int, scale: float) -> None:
    x = normal(20, 6, seed=seed)
    rotation = torch.linalg.qr(normal(6, 6, seed=seed + 1))[0]
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-9)
    assert linear_cka(x, scale * x @ rotation + 100.0) == pytest.approx(1, abs=1e-7)
    y = x[:, :2] + normal(20, 2, seed=seed + 2)
    same = linear_cka(x, y)
    assert linear_cka(x @ rotation * scale - 3.0, y) == pytest.approx(same, abs=1e-7)
    assert same < 1 - 1e-6


def test_independent_representations_are_unlike_and_batches_agree_with_one() -> None:
    x, y = normal(640, 5, seed=0), normal(640, 7, seed=1)
    z = x + 0.5 * normal(640, 5, seed=2)
    whole = [linear_cka(x, other) for other in (x, y, z)]
    cka = MinibatchCka()
    for index in torch.arange(640).split(32):
        cka.add([x[index]], [other[index] for other in (x, y, z)])
    found = cka.result()[0].tolist()
    assert found == pytest.approx(whole, abs=0.03)
    assert abs(found[1]) < 0.05 < 0.5 < found[2] < 0.95
    assert cka.images == 640


def test_layers_of_any_width_are_compared_all_with_all() -> None:
    a = [normal(12, width, seed=width) for width in (2, 3, 9)]
    b = [normal(12, width, seed=width) for width in (3, 5)]
    cka = MinibatchCka()
    cka.add(a, b)
    expected = [[linear_cka(x, y) for y in b] for x in a]
    torch.testing.assert_close(cka.result(), torch.tensor(expected, dtype=torch.float64))


def test_a_layer_that_is_the_same_for_all_images_has_no_similarity() -> None:
    cka = MinibatchCka()
    cka.add([torch.ones(5, 3)], [normal(5, 3, seed=0)])
    assert cka.result().isnan().all()


def test_too_few_images_or_different_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 images"):
        linear_cka(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="same images"):
        MinibatchCka().add([torch.ones(5, 2)], [torch.ones(6, 2)])
    with pytest.raises(ValueError, match="at least one batch"):
        MinibatchCka().result()
