"""Position embeddings: NaViT's factorized ones, and the grids of ViT and SigLIP."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit import NaViT, NaViTConfig
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.grid_embed import axis_weights, resize_grid
from navit.model.pos_embed import make_pos_embed
from tests.helpers.batches import pack_images, random_image
from tests.reference import dense_vit

KINDS = ["fourier", "learned", "sinusoidal"]
FACTORIZED = list(itertools.product(KINDS, ["fractional", "absolute"], ["sum", "product", "stack"]))
INTERPOLATIONS = ["antialias", "corners", "bicubic", "bicubic_antialias"]


def make(kind: str, dtype: torch.dtype = torch.float64, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = NaViTConfig.named("tiny", **{"pos_embed": kind, "pos_table_size": 4, **changes})
    return make_pos_embed(config).to(dtype)


def embed(module: torch.nn.Module, positions: list[list[int]], grid: list[int]) -> Tensor:
    ids = torch.tensor(positions, dtype=torch.int32).reshape(-1, 2)
    return module(ids, torch.tensor(grid, dtype=torch.int32).expand(len(ids), 2)).detach()


@pytest.mark.parametrize(("kind", "coordinates", "combine"), FACTORIZED)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), rows=st.integers(1, 300), cols=st.integers(1, 300))
def test_a_position_combines_its_row_and_its_column(
    kind: str, coordinates: str, combine: str, data: st.DataObject, rows: int, cols: int
) -> None:
    place = [data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))]
    module = make(kind, pos_coordinates=coordinates, pos_combine=combine)
    state = {f"pos_embed.{name}": value for name, value in module.state_dict().items()}
    state["norm.weight"] = torch.ones(64, dtype=torch.float64)

    reference = dense_vit.Positions(coordinates, combine, table_size=4)

    torch.testing.assert_close(
        embed(module, [place], [rows, cols])[0],
        reference.embed(state, place, (rows, cols)),
        rtol=0,
        atol=1e-11,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_fractions_are_equal_at_every_resolution(kind: str) -> None:
    module = make(kind)
    small, large = embed(module, [[1, 2]], [4, 8]), embed(module, [[10, 20]], [40, 80])
    torch.testing.assert_close(small, large, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_absolute_positions_do_not_depend_on_the_grid_and_agree_on_the_nominal_side(
    kind: str,
) -> None:
    absolute, fractional = make(kind, pos_coordinates="absolute"), make(kind)
    places = [[0, 0], [3, 1], [2, 2]]
    expected = embed(fractional, places, [4, 4])
    for grid in ([4, 4], [9, 30]):
        torch.testing.assert_close(embed(absolute, places, grid), expected, rtol=0, atol=1e-12)


def test_sinusoids_are_those_of_the_transformer() -> None:
    """PE(p, i) = sin(p / 10000^(2 i / d)), the cosine beside it: a literal of the paper's form."""
    module = make("sinusoidal", pos_coordinates="absolute", pos_combine="stack")
    [found] = embed(module, [[7, 0]], [9, 9]) / 0.3
    assert found[0].item() == pytest.approx(0.6569865987187891, abs=1e-6)  # sin 7
    assert found[16].item() == pytest.approx(0.7539022543433046, abs=1e-6)  # cos 7
    assert found[8].item() == pytest.approx(0.06994284733753277, abs=1e-6)  # sin 0.07
    assert found[32:48].abs().max() == 0


def test_a_table_of_the_side_s_length_is_read_unchanged() -> None:
    module = make("learned", torch.float32, pos_table_size=5)
    found = embed(module, [[p, 0] for p in range(5)], [5, 5])
    torch.testing.assert_close(found, (module.rows.table + module.cols.table[0]).detach())


@pytest.mark.parametrize(("kind", "coordinates", "combine"), FACTORIZED)
def test_a_fresh_model_can_tell_left_from_above(kind: str, coordinates: str, combine: str) -> None:
    """Equal functions of row and column would give (1, 3) and (3, 1) the same sum."""
    module = make(kind, pos_coordinates=coordinates, pos_combine=combine)
    one, other = embed(module, [[1, 3], [3, 1]], [4, 4])
    assert (one - other).norm() > 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", ["sum", "product", "stack"])
def test_positions_start_at_a_size_like_that_of_the_sum(kind: str, combine: str) -> None:
    module = make(kind, pos_combine=combine, pos_table_size=16)
    places = [[row, col] for row in range(16) for col in range(16)]
    size = embed(module, places, [16, 16]).square().mean().sqrt()
    reference = embed(make(kind, pos_table_size=16), places, [16, 16]).square().mean().sqrt()
    assert 0.4 < size / reference < 2


def test_bfloat16_weights_tell_neighbouring_fractions_apart() -> None:
    exact = embed(make("fourier"), [[500, 1], [501, 1]], [1000, 1000])
    half = embed(make("fourier", torch.bfloat16), [[500, 1], [501, 1]], [1000, 1000])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.02)


# Grids


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), size=st.integers(1, 16))
def test_a_grid_is_resized_as_torch_does(
    interpolation: str, rows: int, cols: int, size: int
) -> None:
    module = make("grid", pos_table_size=size, pos_interpolation=interpolation)
    expected = dense_vit.resized_table(module.table.detach(), (rows, cols), interpolation)

    places = [[row, col] for row in range(rows) for col in range(cols)]
    found = embed(module, places, [rows, cols])

    torch.testing.assert_close(found, expected.reshape(-1, 64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_grid_of_the_tables_size_is_read_unchanged(interpolation: str) -> None:
    module = make("grid", pos_table_size=5, pos_interpolation=interpolation)
    places = [[row, col] for row in range(5) for col in range(5)]
    torch.testing.assert_close(
        embed(module, places, [5, 5]), module.table.detach(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_weights_sum_to_one_on_any_side(interpolation: str) -> None:
    side = torch.arange(1, 60, dtype=torch.int32)
    weights = axis_weights(side - 1, side, 7, interpolation)
    torch.testing.assert_close(weights.sum(1), torch.ones(59, dtype=torch.float64))


# Grids of another size


@settings(max_examples=25, deadline=None)
@given(old=st.integers(1, 9), new=st.integers(1, 20), seed=st.integers(0, 999))
def test_a_table_is_resized_with_its_corners_kept(old: int, new: int, seed: int) -> None:
    """Entry i of the new axis lies at i (old - 1) / (new - 1) of the old one, between two."""
    table = torch.randn(old, old, 3, generator=torch.Generator().manual_seed(seed)).double()

    found = resize_grid(table.flatten(0, 1), new, "corners").view(new, new, 3)

    for row, col in itertools.product(range(new), repeat=2):
        y, x = (i * (old - 1) / max(new - 1, 1) for i in (row, col))
        top, left = min(int(y), max(old - 2, 0)), min(int(x), max(old - 2, 0))
        down, right = min(top + 1, old - 1), min(left + 1, old - 1)
        above = (1 - x + left) * table[top, left] + (x - left) * table[top, right]
        below = (1 - x + left) * table[down, left] + (x - left) * table[down, right]
        expected = (1 - y + top) * above + (y - top) * below
        torch.testing.assert_close(found[row, col], expected, rtol=0, atol=1e-12)


def test_a_table_is_resized_as_by_the_zoom_of_vits_code() -> None:
    """What scipy.ndimage.zoom(table, 5 / 3, order=1) of SciPy 1.17.1 gives."""
    table = torch.tensor([[1, -2, 4], [0, 3, 7], [5, 8, -6]], dtype=torch.float64)
    expected = [
        [1.0, -0.5, -2.0, 1.0, 4.0],
        [0.5, 0.5, 0.5, 3.0, 5.5],
        [0.0, 1.5, 3.0, 5.0, 7.0],
        [2.5, 4.0, 5.5, 3.0, 0.5],
        [5.0, 6.5, 8.0, 1.0, -6.0],
    ]
    found = resize_grid(table.view(9, 1), 5, "corners").view(5, 5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    found = resize_grid(table.view(9, 1), 2, "corners").view(2, 2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 4], [5, -6]], dtype=torch.float64))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_fine_tuning_starts_from_the_positions_that_were(interpolation: str) -> None:
    """An image of the new grid gets the vector it had; the model itself is left as it was."""
    torch.manual_seed(0)
    config = NaViTConfig.named(
        "tiny", patch_size=4, pos_embed="grid", pos_table_size=3, pos_interpolation=interpolation
    )
    model = Classifier(ClassifierConfig(config, 3)).double().eval()
    torch.nn.init.normal_(model.head.weight)
    image = random_image(6, 6, patch_size=4, generator=torch.Generator().manual_seed(1))
    batch = pack_images([image])

    larger = model.at_grid(6)

    assert larger.config.vision.pos_table_size == larger.vision.config.pos_table_size == 6
    assert larger.vision.pos_embed.table.shape == (36, 64)
    torch.testing.assert_close(larger(batch), model(batch), rtol=0, atol=1e-10)
    assert model.config.vision.pos_table_size == 3
    before = larger.vision.pos_embed.table.clone()
    larger(batch).sum().backward()
    assert larger.vision.pos_embed.table.grad.any(1).all(), "each place has an entry of its own"
    again = larger.at_grid(6, "corners").vision.pos_embed.table
    torch.testing.assert_close(again, before, rtol=0, atol=1e-12)


def test_only_a_grid_has_another_size() -> None:
    with pytest.raises(ValueError, match="resizes the table of pos_embed 'grid'; got 'fourier'"):
        NaViT(NaViTConfig.named("tiny")).at_grid(8)
    with pytest.raises(ValueError, match="pos_table_size must be a positive integer; got 0"):
        NaViT(NaViTConfig.named("tiny", pos_embed="grid")).at_grid(0)
