"""Factorized fractional position embeddings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit import NaViTConfig
from navit.model.pos_embed import PositionEmbed
from tests.reference import dense_vit


def embed(kind: str, position: list[int], grid: list[int], table_size: int = 4) -> Tensor:
    torch.manual_seed(0)
    config = NaViTConfig.named("tiny", pos_embed=kind, pos_table_size=table_size)
    module = PositionEmbed(config).double()
    ids = (torch.tensor([x], dtype=torch.int32) for x in (position, grid))
    return module(*ids)[0].detach()


@pytest.mark.parametrize("kind", ["fourier", "learned"])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), rows=st.integers(1, 300), cols=st.integers(1, 300))
def test_a_position_is_the_sum_of_its_row_and_column(
    kind: str, data: st.DataObject, rows: int, cols: int
) -> None:
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    torch.manual_seed(0)
    config = NaViTConfig.named("tiny", pos_embed=kind, pos_table_size=4)
    state = {
        f"pos_embed.{name}": value
        for name, value in PositionEmbed(config).double().state_dict().items()
    }
    expected = dense_vit.position(state, "rows", row / rows)
    expected = expected + dense_vit.position(state, "cols", col / cols)
    found = embed(kind, [row, col], [rows, cols])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["fourier", "learned"])
def test_equal_fractions_are_equal_at_every_resolution(kind: str) -> None:
    small, large = embed(kind, [1, 2], [4, 8]), embed(kind, [10, 20], [40, 80])
    torch.testing.assert_close(small, large, rtol=0, atol=1e-12)


def test_a_table_of_the_side_s_length_is_read_unchanged() -> None:
    torch.manual_seed(0)
    module = PositionEmbed(NaViTConfig.named("tiny", pos_embed="learned", pos_table_size=5))
    ids = torch.stack([torch.arange(5), torch.zeros(5)], dim=1).int()
    found = module(ids, torch.full((5, 2), 5, dtype=torch.int32))
    torch.testing.assert_close(found, module.rows.table + module.cols.table[0])


@pytest.mark.parametrize("kind", ["fourier", "learned"])
def test_a_fresh_model_can_tell_left_from_above(kind: str) -> None:
    """Equal functions of row and column would give (1, 3) and (3, 1) the same sum."""
    assert (embed(kind, [1, 3], [4, 4]) - embed(kind, [3, 1], [4, 4])).norm() > 0.3
