"""Filters and positions: principal components and similarities against plain references."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.analyze import filter_components, position_similarity
from navit.analyze.filters import patch_weights
from navit.analyze.positions import grids_of, spread_places
from navit.model import NaViT, NaViTConfig

POSITIONS: list[dict[str, Any]] = [
    {"pos_embed": kind, "pos_combine": combine, "pos_coordinates": coordinates}
    for kind in ("fourier", "learned", "sinusoidal")
    for combine in ("sum", "product", "stack")
    for coordinates in ("fractional", "absolute")
] + [
    {"pos_embed": "grid", "pos_interpolation": interpolation}
    for interpolation in ("antialias", "corners", "bicubic", "bicubic_antialias")
]


def tower(**changes: Any) -> NaViT:
    torch.manual_seed(0)
    return NaViT(NaViTConfig.named("tiny", depth=1, **{"patch_size": 4, **changes})).eval()


def test_components_are_the_eigenvectors_of_the_weights_covariance() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)) @ torch.diag(
        torch.linspace(3, 0.1, 48)
    )
    found = filter_components(weight, 10)
    values, vectors = np.linalg.eigh(np.cov(weight.double().numpy(), rowvar=False))
    assert found.shares.tolist() == pytest.approx(values[::-1][:10] / values.sum(), abs=1e-6)
    for pattern, vector in zip(found.filters, vectors.T[::-1], strict=False):
        flat = pattern.flatten().double().numpy()
        assert abs(flat @ vector) == pytest.approx(1, abs=1e-5)
        assert flat[np.abs(flat).argmax()] > 0
    assert found.filters.shape == (10, 4, 4, 3)


def test_a_filter_keeps_the_order_of_rows_columns_and_channels() -> None:
    pattern = torch.zeros(4, 4, 3)
    pattern[1, 2, 0] = 1.0
    weight = torch.linspace(-1, 1, 8)[:, None] * pattern.flatten()
    found = filter_components(weight)
    torch.testing.assert_close(found.filters[0], pattern)
    assert found.shares[0] == pytest.approx(1)


def test_weights_that_are_all_the_same_have_no_variance_and_no_error() -> None:
    assert filter_components(torch.ones(6, 12)).shares.tolist() == pytest.approx([0] * 6, abs=1e-9)


@pytest.mark.parametrize(("changes", "side"), [({}, 4), ({"patch_buffer": 6}, 6)])
def test_the_filters_are_those_of_the_patch_size_or_of_the_buffer(
    changes: dict[str, Any], side: int
) -> None:
    weight = patch_weights(tower(**changes))
    assert weight is not None
    assert filter_components(weight).filters.shape == (28, side, side, 3)


@pytest.mark.parametrize("changes", POSITIONS, ids=lambda changes: "-".join(changes.values()))
@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (5, 1)])
def test_similarity_is_the_cosine_of_two_embeddings(
    changes: dict[str, Any], grid: tuple[int, int]
) -> None:
    model = tower(**changes)
    places = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    found = position_similarity(model, grid)
    assert found.shape == (len(places), *grid)
    for number, place in enumerate(places):
        for row, col in places[:: max(len(places) // 3, 1)]:
            pair = torch.tensor([place, (row, col)], dtype=torch.int32)
            sides = torch.tensor([grid, grid], dtype=torch.int32)
            with torch.no_grad():
                a, b = model.pos_embed(pair, sides).double().numpy()
            cosine = a @ b / np.sqrt((a @ a) * (b @ b))
            assert float(found[number, row, col]) == pytest.approx(cosine, abs=2e-5)
    chosen = [places[-1], places[0]]
    torch.testing.assert_close(position_similarity(model, grid, chosen), found[[-1, 0]])


@settings(deadline=None)
@given(tokens=st.integers(1, 5000))
def test_grids_have_at_most_the_budget_and_places_keep_the_edges(tokens: int) -> None:
    for rows, cols in grids_of(tokens):
        assert 0 < rows * cols <= tokens
        for side, chosen in zip((rows, cols), spread_places((rows, cols)), strict=True):
            assert chosen == sorted(set(chosen))
            assert (chosen[0], chosen[-1]) == (0, side - 1)
            assert len(chosen) == min(side, 7)
