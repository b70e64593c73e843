"""PI-resize: patch-embedding weights of one patch size as weights of another.

A patch x is resized by a linear map, Bx. The weights of the other size are those whose products
with resized patches are closest to the old ones with the patches themselves: for independent
pixels of equal variance ``pinv(B^T) w`` minimises the expected ``(<Bx, w'> - <x, w>)^2``. Enlarged,
nothing is lost and the products are equal; a plain resize of the weights would change them by the
factor that the number of pixels grows by.

Source: FlexiViT (arXiv:2212.08013), section 3.4 "Pseudo-inverse resize". B is bilinear with
half-pixel centres and no antialias. It is separable, B = R (x) R, and so is its pseudo-inverse:
two small matrices take the place of one with a million entries.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor


def bilinear_matrix(old: int, new: int) -> npt.NDArray[np.float64]:
    """Return the bilinear resize of ``old`` values to ``new`` ones: half-pixel, no antialias.

    Returns:
        float64 (new, old); each row has at most two entries, which sum to 1.
    """
    centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(centre.astype(np.int64), max(old - 2, 0))
    share = centre - low
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), low), 1 - share)
    np.add.at(matrix, (np.arange(new), np.minimum(low + 1, old - 1)), share)
    return matrix


@lru_cache(maxsize=1024)  # 32 to each of 10 sizes is 10 entries, of a few kB each
def pi_matrix(old: int, new: int) -> npt.NDArray[np.float64]:
    """Return the PI-resize of weights along one axis, from ``old`` pixels to ``new``.

    Returns:
        float64 (new, old), read-only: the pseudo-inverse of the transposed bilinear resize.
    """
    transposed = bilinear_matrix(old, new).T
    matrix: npt.NDArray[np.float64] = np.asarray(np.linalg.pinv(transposed), dtype=np.float64)
    matrix.setflags(write=False)
    return matrix


def pi_resize(weight: Float[Tensor, "D old"], new: int) -> Float[Tensor, "D new"]:
    """Resize patch-embedding weights to patches of ``new`` x ``new`` pixels; differentiable.

    Args:
        weight: (D, 3 * side**2) in (row, column, channel) order, as `PatchEmbed` keeps them.
        new: The other side in pixels.

    Returns:
        (D, 3 * new**2), in float32 or better, whatever autocast says: weights of half precision
        would lose in the resize what they have. Of a weight that has this size, itself.
    """
    side = patch_side(weight.shape[1])
    return weight if side == new else _resized(weight, side, _Map(side, new, transposed=False))


def pi_buffer(weight: Float[Tensor, "D old"], side: int) -> Float[Tensor, "D new"]:
    """Return the weights of a larger patch that `pi_resize` takes back to these.

    Of all such weights the smallest: ``B^T w``, with B from ``side`` pixels to their own side. The
    resize up, ``pinv(B^T) w``, is not undone by the resize down, which reads few of a large patch's
    pixels. A ``side`` below the weights' own has no such weights; these come closest.

    Args:
        weight: (D, 3 * old**2), as for `pi_resize`.
        side: Side in pixels of the patches they are for.
    """
    old = patch_side(weight.shape[1])
    return weight if side == old else _resized(weight, old, _Map(side, old, transposed=True))


class _Map(NamedTuple):
    """A map of pixels along one axis."""

    old: int
    new: int
    transposed: bool
    """B^T of the resize from old to new, (old, new); else its pseudo-inverse, (new, old)."""


@lru_cache(maxsize=256)
def _on_device(along: _Map, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "to side"]:
    """Keep the matrix where it is used: nothing is copied to the device in a step."""
    old, new, transposed = along
    matrix = bilinear_matrix(old, new).T if transposed else pi_matrix(old, new)
    with torch.inference_mode(mode=False):  # a tensor made in it could not be used in training
        return torch.tensor(matrix, dtype=dtype, device=device)


def _resized(weight: Tensor, side: int, along: _Map) -> Tensor:
    """Apply a map to the rows and the columns of every patch of weights."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    matrix = _on_device(along, dtype, weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        rows = matrix @ weight.to(dtype).view(len(weight), side, side * 3)
        both = rows.view(len(weight), -1, side, 3).transpose(2, 3) @ matrix.T
    return both.transpose(2, 3).flatten(1)


def patch_side(num_values: int) -> int:
    """Return the side of a square RGB patch of so many values.

    Raises:
        ValueError: If no square patch has as many.
    """
    side = int((num_values / 3) ** 0.5 + 0.5)
    if 3 * side**2 != num_values:
        raise ValueError(
            f"a patch must have 3 * side**2 values; got {num_values}. Give RGB weights of square "
            "patches."
        )
    return side
