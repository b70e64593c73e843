"""Which patches masked prediction corrupts, how, and the colour classes it asks for.

Whether and how a patch is corrupted follows from (a seed, its image's key, its place in the grid)
alone: it is the same whatever the image is packed with, whichever tokens were dropped, and on any
device. The patch that stands in another's place is drawn from those that were kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, Int64, UInt8
from torch import Tensor

from navit.model.config import ModelConfig

COLOURS = 512
"""Classes of a patch's mean colour: 3 bits a channel."""
_BITS = 3


@dataclass(frozen=True)
class Corruption(ModelConfig):
    """Shares of patches that are corrupted, and of these how many in which way.

    Source: ViT (arXiv:2010.11929), appendix B.1.2, after BERT (arXiv:1810.04805), section 3.1.
    """

    share: float = 0.5
    """Probability of a patch to be corrupted; it alone is asked for its colour."""
    mask: float = 0.8
    """Of a corrupted patch, to be replaced by the learned mask embedding."""
    swap: float = 0.1
    """To be replaced by the embedding of another patch of its image; the rest stay as they are."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1]; got {self.share}.")
        if min(self.mask, self.swap) < 0 or self.mask + self.swap > 1 + 1e-9:
            raise ValueError(
                "mask and swap must be at least 0 and at most 1 together; got "
                f"{self.mask} and {self.swap}."
            )


class Corrupted(NamedTuple):
    """The fate of the T tokens of a batch."""

    asked: Bool[Tensor, " T"]
    """Corrupted in any of the three ways."""
    masked: Bool[Tensor, " T"]
    """Of these, replaced by the mask embedding."""
    source: Int64[Tensor, " T"]
    """Token whose embedding stands in each token's place: its own but for those swapped."""


def key_bits(keys: Sequence[str]) -> Int64[np.ndarray, " N"]:
    """Return 64 random bits for each image, from its key."""
    digests = (
        blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys
    )
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def draw_corruption(
    config: Corruption,
    seed: Int64[Tensor, ""],
    bits: Int64[Tensor, " N"],
    image: Int64[Tensor, " T"],
    lengths: Int64[Tensor, " N"],
    starts: Int64[Tensor, " N"],
    positions: Int32[Tensor, "T 2"],
) -> Corrupted:
    """Decide the fate of every token, on the device its tensors are on.

    Args:
        config: The shares.
        seed: Another one, another corruption of the same images.
        bits: 64 of each image, see `key_bits`.
        image: Which of the N images each token is of; an image's tokens lie together.
        lengths: Tokens of each image.
        starts: Place of the first of them.
        positions: (row, col) of each token.
    """
    rows, cols = positions.long().unbind(1)
    draws = _mix(_mix(bits ^ _mix(seed))[image] ^ _mix((rows << 32) | cols))
    fate = _uniform(draws)
    masked, swapped = (config.share * x for x in (config.mask, config.mask + config.swap))
    place = torch.arange(len(image), device=image.device)
    length, start = lengths[image], starts[image]
    # One of the others; of a single token there is none, and it stays.
    step = 1 + (_uniform(_mix(draws)) * (length - 1)).long()
    other = start + (place - start + step) % length
    return Corrupted(
        asked=fate < config.share,
        masked=fate < masked,
        source=torch.where((fate >= masked) & (fate < swapped), other, place),
    )


def colour_classes(
    patches: UInt8[Tensor, "T P"], pixels: int | Int[Tensor, " T"]
) -> Int64[Tensor, " T"]:
    """Return the mean colour of patches as one of 512 classes: 64 red + 8 green + blue, 0 to 7.

    Args:
        patches: Values in (row, column, channel) order; behind those of a smaller patch zeros.
        pixels: Pixels of a patch, or of each.

    Returns:
        0 for black, 511 for white.

    Source: ViT (arXiv:2010.11929), appendix B.1.2, "3-bit mean colour".
    """
    sums = patches.view(len(patches), patches.shape[1] // 3, 3).sum(1, dtype=torch.int64)
    if isinstance(pixels, Tensor):
        pixels = pixels[:, None]
    red, green, blue = (sums // (pixels << (8 - _BITS))).unbind(1)
    return (red << (2 * _BITS)) | (green << _BITS) | blue


def _mix(x: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """Scramble 64 bits: MurmurHash3's finaliser, whose steps can all be undone."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ _shifted(x, 33)) * (factor - (1 << 64))  # as a signed number; products wrap
    return x ^ _shifted(x, 33)


def _shifted(x: Int64[Tensor, "*n"], bits: int) -> Int64[Tensor, "*n"]:
    """Shift right, zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(x: Int64[Tensor, " n"]) -> Tensor:
    """Map 64 bits to float64 in [0, 1)."""
    return _shifted(x, 11).double() * 2.0**-53
