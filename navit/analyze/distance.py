"""How far the heads of each layer look: mean attention distance."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from navit.model import NaViT
from navit.model.inspect import CHUNK_VALUES, ImageStates, attention_rows


class AttentionDistance(NamedTuple):
    """Of one image, by layer and head, averaged over its patches as queries."""

    patches: Float[Tensor, "depth H"]
    """Mean distance of query and key in patches."""
    on_added: Float[Tensor, "depth H"]
    """Share of the patches' attention that goes to the class token and the registers."""


def attention_distance(
    tower: NaViT, image: ImageStates, *, chunk_values: int = CHUNK_VALUES
) -> AttentionDistance:
    """Average the distance between query and key, weighted by attention.

    Added tokens have no place: they are neither queries nor keys here, and what is left of each
    row's weights is scaled to sum to 1. Of n tokens, H * n weights of some queries are held at a
    time (`attention_rows`), and the distances of the same queries.

    Args:
        tower: The tower.
        image: One image's tokens, none of them changed.
        chunk_values: Attention weights computed at a time.

    Source: ViT (arXiv:2010.11929), section 4.5, figure 7 right, and appendix D.7, figure 11.
    """
    added, places = image.num_prefix, image.positions.double()
    means, shares = [], []
    for block, x in zip(tower.blocks, image.states[:-1], strict=True):
        sums = torch.zeros(2, tower.config.num_heads, dtype=torch.float64, device=x.device)
        for start, weights in attention_rows(block, x, chunk_values=chunk_values):  # type: ignore[arg-type]
            queries = weights[:, max(added - start, 0) :]
            first = max(start - added, 0)
            between = torch.cdist(places[first : first + queries.shape[1]], places)
            sums += torch.stack(_row_sums(queries, between.to(weights.dtype), added))
        means.append(sums[0] / len(places))
        shares.append(sums[1] / len(places))
    return AttentionDistance(torch.stack(means).cpu(), torch.stack(shares).cpu())


def _row_sums(
    weights: Float[Tensor, "H rows n"], between: Float[Tensor, "rows m"], added: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " H"]]:
    """Sum over the queries: mean distance on patches, and weight on added tokens."""
    far = torch.einsum("hqk,qk->hq", weights[:, :, added:], between)
    on_added = weights[:, :, :added].sum(2)
    on_patches = weights[:, :, added:].sum(2)
    tiny = torch.finfo(weights.dtype).tiny
    return (far / on_patches.clamp(min=tiny)).double().sum(1), on_added.double().sum(1)


def uniform_distance(positions: Int32[Tensor, "m 2"]) -> float:
    """Return the mean distance, in patches, of attention that is the same everywhere."""
    places = positions.double().cpu()
    total = 0.0
    for start in range(0, len(places), 1024):
        total += float(torch.cdist(places[start : start + 1024], places).sum())
    return total / len(places) ** 2
