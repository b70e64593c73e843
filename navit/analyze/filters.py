"""What the patch embedding looks for: principal components of its weights, as RGB filters."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from navit.model import NaViT
from navit.model.flexi_embed import FlexiPatchEmbed
from navit.model.patch_embed import PatchEmbed

NUM_FILTERS = 28
"""As many as ViT's figure shows."""


class Filters(NamedTuple):
    """Principal components of a patch embedding's weights, the largest first."""

    filters: Float[Tensor, "K P P 3"]
    """Of length 1; the sign is that which makes the value of largest size positive."""
    shares: Float[Tensor, " K"]
    """Share of the weights' variance over the D filters that each explains."""


def filter_components(weight: Float[Tensor, "D values"], count: int = NUM_FILTERS) -> Filters:
    """Return the principal components of D filters over (P, P, 3) pixels.

    Args:
        weight: One filter a row, in (row, column, channel) order.
        count: Components wanted; fewer where the weights have fewer.

    Source: ViT (arXiv:2010.11929), section 4.5, figure 7 left.
    """
    side = round((weight.shape[1] / 3) ** 0.5)
    values = weight.detach().double().cpu()
    _, sizes, components = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    variance = sizes.square()
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    filters = (components * largest.sign()).view(-1, side, side, 3)
    shares = variance / variance.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Filters(filters[:count].float(), shares[:count].float())


def patch_weights(tower: NaViT) -> Float[Tensor, "D values"] | None:
    """Return the filters of a tower, as large as its buffer where it has one; None with a stem."""
    embed = tower.patch_embed
    return embed.proj.weight if isinstance(embed, PatchEmbed | FlexiPatchEmbed) else None
