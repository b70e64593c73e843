"""Position embeddings: factorized ones of NaViT, and the learned grids of ViT and SigLIP.

Factorized: phi_y(row) and phi_x(col), combined. Their coordinate is in units of a nominal side:
r = p / side for fractional positions, p / `pos_table_size` for absolute ones, so that both agree
on a side of `pos_table_size` patches. Source: NaViT (arXiv:2307.06304), section 2.1 "Factorized &
fractional positional embeddings" and appendix C.1; the fraction is in [0, 1), as the text has it.
"""

import math

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from navit.model.config import NaViTConfig
from navit.model.grid_embed import GridEmbed


class FourierFeatures(nn.Module):
    """phi(r) = a (sin(w r), cos(w r)) with learned angular frequencies w and amplitude a.

    The frequencies start log-uniform between a quarter turn and two turns a side: smooth, so that
    neighbouring patches start alike. They are random so that rows and columns start with different
    ones: with equal ones the sum would be the same at (row, col) and (col, row), and left could
    not be told from above. A learned amplitude starts at 0.3, below the size of a patch's vector:
    at 1 the first block sees where a patch is before what it shows.
    """

    def __init__(self, width: int, amplitude: float = 0.3) -> None:
        super().__init__()
        turns = 2 ** torch.empty(width // 2).uniform_(math.log2(0.25), math.log2(2))
        self.frequencies = nn.Parameter(2 * math.pi * turns)
        self.amplitude = nn.Parameter(torch.tensor(amplitude))

    def forward(self, coordinate: Float[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embed coordinates, in sides."""
        angle = coordinate[:, None] * self.frequencies
        return self.amplitude * torch.cat([angle.sin(), angle.cos()], dim=1)


class Sinusoids(nn.Module):
    """phi(r): the fixed sinusoids of the transformer, wavelengths of 2 pi to 20,000 pi patches.

    Source: arXiv:1706.03762, section 3.5, at r times ``size``, which is the position itself on a
    side of ``size`` patches. Ours are the learned amplitude, as for `FourierFeatures`, and the
    ``shift`` in steps of the frequencies: with equal ones for both axes the sum, or product, would
    be the same at (row, col) and (col, row).
    """

    def __init__(self, width: int, size: int, amplitude: float = 0.3, shift: float = 0.0) -> None:
        super().__init__()
        self.pairs, self.size, self.shift = width // 2, size, shift
        self.amplitude = nn.Parameter(torch.tensor(amplitude))

    def forward(self, coordinate: Float[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embed coordinates, in sides."""
        # Made in the coordinates' type: a buffer would be cast with the weights.
        steps = torch.arange(self.pairs, dtype=coordinate.dtype, device=coordinate.device)
        frequencies = self.size * 10_000.0 ** (-(steps + self.shift) / self.pairs)
        angle = coordinate[:, None] * frequencies
        return self.amplitude * torch.cat([angle.sin(), angle.cos()], dim=1)


class InterpolatedTable(nn.Module):
    """phi(r): a learned table read at r * size with linear interpolation.

    A side of exactly ``size`` patches reads the entries unchanged; other sides read between them,
    and beyond the last entry the last is repeated.
    """

    def __init__(self, width: int, size: int, std: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, width) * std)

    def forward(self, coordinate: Float[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embed coordinates, in sides."""
        last = self.table.shape[0] - 1
        place = coordinate * (last + 1)
        low = place.long().clamp(max=last)
        high = (low + 1).clamp(max=last)
        share = (place - low)[:, None].to(self.table.dtype)
        return torch.lerp(self.table[low], self.table[high], share)


class PositionEmbed(nn.Module):
    """A row's and a column's embedding, combined by sum, product or stacking."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.coordinates, self.combine = config.pos_coordinates, config.pos_combine
        self.table_size = config.pos_table_size
        self.rows = _make_axis(config)
        self.cols = _make_axis(config, shift=0.0 if self.combine == "stack" else 0.5)

    def forward(
        self, position_ids: Int32[Tensor, "T 2"], grid_sizes: Int32[Tensor, "T 2"]
    ) -> Float[Tensor, "T D"]:
        """Embed (row, col) of each token, given (rows, cols) of its image before dropping."""
        weights = next(self.parameters()).dtype
        dtype = torch.promote_types(weights, torch.float32)  # 8 bits tell few fractions apart
        sides = grid_sizes if self.coordinates == "fractional" else self.table_size
        row, col = (position_ids.to(dtype) / sides).unbind(1)
        by_row, by_col = self.rows(row), self.cols(col)
        if self.combine == "stack":
            return torch.cat([by_row, by_col], dim=1).to(weights)
        combined: Tensor = by_row * by_col if self.combine == "product" else by_row + by_col
        return combined.to(weights)


def _make_axis(config: NaViTConfig, shift: float = 0.0) -> nn.Module:
    """Return phi of one axis; the product of two has about the size that the sum of two has."""
    product = config.pos_combine == "product"
    width = config.width // 2 if config.pos_combine == "stack" else config.width
    if config.pos_embed == "learned":
        std = config.width ** (-0.25 if product else -0.5)
        return InterpolatedTable(width, config.pos_table_size, std)
    amplitude = 0.65 if product else 0.3
    if config.pos_embed == "sinusoidal":
        return Sinusoids(width, config.pos_table_size, amplitude, shift)
    return FourierFeatures(width, amplitude)


def make_pos_embed(config: NaViTConfig) -> nn.Module:
    """Return the position embedding that the configuration names."""
    return GridEmbed(config) if config.pos_embed == "grid" else PositionEmbed(config)
