"""One learned table over rows and columns, interpolated to each image's grid: ViT and SigLIP.

Interpolation is linear and separable: a token's embedding is the table times the outer product of
a row's and a column's weights. The weights follow from position and side alone, so tokens of any
grids are embedded together, dropped ones cost nothing, and nothing is read back from the device.
"""

from math import isqrt

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from navit.model.config import GridInterpolation, NaViTConfig


class GridEmbed(nn.Module):
    """An n x n table of vectors, resized to (rows, cols) as `torch.nn.functional.interpolate` does.

    On a grid of the table's size it is ViT's learned 1-D embedding, one vector for each place.

    Source: ViT (arXiv:2010.11929), section 3.2 (2-D interpolation; the code aligns corners); SigLIP
    2 (arXiv:2502.14786), section 2.2 "NaFlex" (antialiased bilinear).
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.size, self.interpolation = config.pos_table_size, config.pos_interpolation
        self.table = nn.Parameter(torch.randn(self.size**2, config.width) * config.width**-0.5)

    def forward(
        self, position_ids: Int32[Tensor, "T 2"], grid_sizes: Int32[Tensor, "T 2"]
    ) -> Float[Tensor, "T D"]:
        """Embed (row, col) of each token, given (rows, cols) of its image before dropping."""
        rows, cols = (
            axis_weights(position_ids[:, axis], grid_sizes[:, axis], self.size, self.interpolation)
            for axis in (0, 1)
        )
        weights = (rows[:, :, None] * cols[:, None, :]).flatten(1)
        return weights.to(self.table.dtype) @ self.table


def resize_grid(
    table: Float[Tensor, "n D"], size: int, interpolation: GridInterpolation
) -> Float[Tensor, "m D"]:
    """Resize a table itself, so that training goes on from interpolated positions.

    Args:
        table: n x n vectors, row by row.
        size: Side of the new table; m is its square.
        interpolation: "corners" is what ViT's code does with ``scipy.ndimage.zoom(order=1)``.

    Source: ViT (arXiv:2010.11929), section 3.2 "Fine-tuning and higher resolution".
    """
    place = torch.arange(size, dtype=torch.int32, device=table.device)
    side = isqrt(table.shape[0])
    weights = axis_weights(place, torch.full_like(place, size), side, interpolation)
    cells = table.view(side, side, -1).to(weights.dtype)
    resized = torch.einsum("ai,bj,ijd->abd", weights, weights, cells)
    return resized.flatten(0, 1).to(table.dtype)


def axis_weights(
    position: Int32[Tensor, " T"],
    side: Int32[Tensor, " T"],
    size: int,
    interpolation: GridInterpolation,
) -> Float[Tensor, "T size"]:
    """Return how much each of a table's ``size`` entries counts at a position on a side.

    Args:
        position: Position in patches, from 0.
        side: Patches of the side the table is resized to.
        size: Entries of the table along this axis.
        interpolation: "antialias", "corners", "bicubic" or "bicubic_antialias".

    Returns:
        float64 weights that sum to 1 in each row; a side of ``size`` patches reads one entry.
    """
    position, side = position.double(), side.double()
    entries = torch.arange(size, dtype=torch.float64, device=position.device)
    scale = size / side
    if interpolation == "corners":
        centre = position * (size - 1) / (side - 1).clamp(min=1)
        return _triangle(entries - centre[:, None])
    centre = (position + 0.5) * scale - 0.5
    distance = entries - centre[:, None]
    if interpolation == "bicubic":
        return _clamped_cubic(centre, size)
    stretch = scale.clamp(min=1)[:, None]  # the kernel widens where the table is reduced
    kernel = _triangle if interpolation == "antialias" else _cubic
    weights = kernel(distance / stretch)
    return weights / weights.sum(1, keepdim=True)  # at the edges only the entries there are count


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic kernel; antialiased resizes use a = -0.5, torch's plain bicubic -0.75."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _clamped_cubic(centre: Tensor, size: int) -> Float[Tensor, "T size"]:
    """Weights of torch's bicubic without antialias, which repeats the table's edge entries."""
    first = centre.floor()
    taps = first[:, None] + torch.arange(-1, 3, dtype=centre.dtype, device=centre.device)
    values = _cubic(taps - centre[:, None], a=-0.75)
    weights = centre.new_zeros(len(centre), size)
    return weights.scatter_add_(1, taps.clamp(0, size - 1).long(), values)
