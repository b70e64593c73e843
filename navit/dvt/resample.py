"""What a stage knows of an image, resized to the grid of the next stage: tokens and relations.

Both resizes are bilinear with half-pixel centres and no antialias, as
`torch.nn.functional.interpolate` with ``align_corners=False``, from each image's own old grid to
its own new one. The authors' code takes nearest neighbours and averages, between three fixed grids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from navit.model.pi_resize import bilinear_matrix
from navit.model.transfer import to_device

Grid = tuple[int, int]
"""(rows, cols) of an image."""
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedResize:
    """Images of any grids resized together: each of the S new tokens reads four old ones."""

    index: Int64[Tensor, "S 4"]
    """Which of the old tokens."""
    weight: Float64[Tensor, "S 4"]
    """How much of each; 0 for the tokens of a prefix, which read nothing."""

    def __call__(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "S C"]:
        """Resize features of the T old tokens."""
        taps = x.index_select(0, self.index.flatten()).view(-1, 4, x.shape[1])
        return (self.weight[:, None, :].to(x.dtype) @ taps).squeeze(1)


def plan_resize(
    old: Sequence[Grid],
    new: Sequence[Grid],
    starts: Counts,
    *,
    prefix: int = 0,
    device: torch.device,
) -> PackedResize:
    """Plan the resize of N >= 1 packed images, on the host.

    Args:
        old: Grid each image's features are on, row by row.
        new: Grid they are resized to.
        starts: (N,) place of each image's first old token.
        prefix: Tokens before each image's own at the new stage (class token, registers).
        device: Where the features are.
    """
    (old_rows, old_cols), (rows, cols) = np.asarray(old).T, np.asarray(new).T
    lengths = rows * cols + prefix
    image = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(image)) - np.repeat(np.cumsum(lengths) - lengths, lengths) - prefix
    is_patch = place >= 0
    row, col = np.divmod(np.maximum(place, 0), cols[image])
    top, bottom, down = _taps(row, old_rows[image], rows[image])
    left, right, across = _taps(col, old_cols[image], cols[image])
    index = np.stack(
        [r * old_cols[image] + c + starts[image] for r in (top, bottom) for c in (left, right)], 1
    )
    weight = np.stack([u * v for u in (1 - down, down) for v in (1 - across, across)], 1)
    return PackedResize(
        to_device(np.where(is_patch[:, None], index, 0), device),
        torch.from_numpy(weight * is_patch[:, None]).to(device),
    )


def _taps(
    position: Counts, old: Counts, new: Counts
) -> tuple[Counts, Counts, npt.NDArray[np.float64]]:
    """Return the two old positions a new one lies between, and the share of the second."""
    centre = np.clip((position + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(centre.astype(np.int64), np.maximum(old - 2, 0))
    return low, np.minimum(low + 1, old - 1), centre - low


def resize_relations(
    logits: Float[Tensor, "*lead S S"], old: Grid, new: Grid, *, prefix: int = 0
) -> Float[Tensor, "*lead S2 S2"]:
    """Return U A U^T: attention logits between all tokens of an image, on its new grid.

    ``U = blockdiag(1, u_rows (x) u_cols)``, with a 1 for each token of the prefix: queries (rows)
    and keys (columns) are resized as images are. U is never made; its factors are applied one after
    the other.

    Args:
        logits: A, of images of one grid: S = prefix + rows * cols.
        old: Their grid.
        new: Grid they are resized to.
        prefix: Tokens before each image's own.

    Source: DVT (arXiv:2105.15075), section 3.2 "Relationship reuse".
    """
    keys = _resize_last(logits, old, new, prefix)  # A U^T
    return _resize_last(keys.transpose(-1, -2), old, new, prefix).transpose(-1, -2)


def _resize_last(x: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """Resize the last axis, which holds a prefix and a grid."""
    added, grid = x[..., :prefix], x[..., prefix:].reshape(*x.shape[:-1], *old)
    rows, cols = (_matrix(a, b, x.dtype, x.device) for a, b in zip(old, new, strict=True))
    wider = _along_last(grid, cols)
    taller = _along_last(wider.transpose(-1, -2), rows).transpose(-1, -2)
    return torch.cat([added, taller.flatten(-2)], dim=-1)


def _along_last(x: Tensor, matrix: Tensor) -> Tensor:
    """Map the last axis, in one product: for strided grids `@` makes thousands of tiny ones."""
    return (x.reshape(-1, x.shape[-1]) @ matrix.T).view(*x.shape[:-1], len(matrix))


@lru_cache(maxsize=1024)
def _matrix(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keep a small matrix where it is used: nothing is copied to the device in a step."""
    with torch.inference_mode(mode=False):  # a tensor made in it could not be used in training
        return torch.tensor(bilinear_matrix(old, new), dtype=dtype, device=device)
