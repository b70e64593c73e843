"""Factorized fractional positions: phi_y(row / rows) + phi_x(col / cols).

Source: NaViT (arXiv:2307.06304), section 2.1 "Factorized & fractional positional embeddings" and
appendix C.1. The fraction is p / side, in [0, 1), as the text has it.
"""

import math

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from navit.model.config import NaViTConfig


class FourierFeatures(nn.Module):
    """phi(r) = a (sin(w r), cos(w r)) with learned angular frequencies w and amplitude a.

    The frequencies start log-uniform between a quarter turn and two turns a side: smooth, so that
    neighbouring patches start alike. They are random so that rows and columns start with different
    ones: with equal ones the sum would be the same at (row, col) and (col, row), and left could
    not be told from above. A learned amplitude starts at 0.3, below the size of a patch's vector:
    at 1 the first block sees where a patch is before what it shows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        turns = 2 ** torch.empty(width // 2).uniform_(math.log2(0.25), math.log2(2))
        self.frequencies = nn.Parameter(2 * math.pi * turns)
        self.amplitude = nn.Parameter(torch.tensor(0.3))

    def forward(self, fraction: Float[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embed positions in [0, 1)."""
        angle = fraction[:, None] * self.frequencies
        return self.amplitude * torch.cat([angle.sin(), angle.cos()], dim=1)


class InterpolatedTable(nn.Module):
    """phi(r): a learned table read at r * size with linear interpolation.

    A side of exactly ``size`` patches reads the entries unchanged; other sides read between them,
    and beyond the last entry the last is repeated.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, width) * width**-0.5)

    def forward(self, fraction: Float[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embed positions in [0, 1)."""
        last = self.table.shape[0] - 1
        place = fraction * (last + 1)
        low = place.long().clamp(max=last)
        high = (low + 1).clamp(max=last)
        share = (place - low)[:, None]
        return torch.lerp(self.table[low], self.table[high], share)


class PositionEmbed(nn.Module):
    """The sum of a row's and a column's embedding of fractional positions."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        if config.pos_embed == "fourier":
            self.rows: nn.Module = FourierFeatures(config.width)
            self.cols: nn.Module = FourierFeatures(config.width)
        else:
            self.rows = InterpolatedTable(config.width, config.pos_table_size)
            self.cols = InterpolatedTable(config.width, config.pos_table_size)

    def forward(
        self, position_ids: Int32[Tensor, "T 2"], grid_sizes: Int32[Tensor, "T 2"]
    ) -> Float[Tensor, "T D"]:
        """Embed (row, col) of each token, given (rows, cols) of its image before dropping."""
        dtype = next(self.parameters()).dtype
        row, col = (position_ids.to(dtype) / grid_sizes).unbind(1)
        out: Tensor = self.rows(row) + self.cols(col)
        return out
