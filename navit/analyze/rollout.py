"""Attention rollout: which patches an image's vector is drawn from."""

import torch
from jaxtyping import Float
from torch import Tensor

from navit.model import NaViT
from navit.model.block import Block
from navit.model.inspect import (
    CHUNK_VALUES,
    ImageStates,
    attention_rows,
    pool_input,
    pool_weights,
)
from navit.model.pool import AttentionPool

RESIDUAL = 0.5
"""Share of the identity mixed into each layer's attention, for the residual connection."""


def attention_rollout(
    tower: NaViT, image: ImageStates, *, chunk_values: int = CHUNK_VALUES
) -> Float[Tensor, " n"]:
    """Follow attention from an image's vector back to the tokens that entered the first block.

    Each layer's weights A are averaged over the heads and mixed with the identity, and the layers
    multiplied: ``p (I + A_L) / 2 ... (I + A_1) / 2``, where ``p`` is what the pooling takes from
    each token: the class token alone, all patches alike, or attention pooling's own weights
    averaged over its heads. It is a row times one matrix after another, from the last layer to the
    first, so no (n, n) matrix is made: held are the image's states, a row of n values, and the
    weights of some queries (`attention_rows`).

    Args:
        tower: The tower.
        image: One image's tokens.
        chunk_values: Attention weights computed at a time.

    Returns:
        Shares that sum to 1, of the R added tokens and then the patches; float64.

    Source: Abnar and Zuidema (arXiv:2005.00928), section 3; ViT (arXiv:2010.11929), appendix D.8.
    """
    row = pooling_shares(tower, image)
    for block, x in zip(reversed(tower.blocks), reversed(image.states[:-1]), strict=True):
        row = RESIDUAL * row + (1 - RESIDUAL) * _through(block, x, row, chunk_values)  # type: ignore[arg-type]
    return row.cpu()


def pooling_shares(tower: NaViT, image: ImageStates) -> Float[Tensor, " n"]:
    """Return what the pooling takes from each of an image's tokens; sums to 1, float64."""
    last = image.states[-1]
    shares = torch.zeros(len(last), dtype=torch.float64, device=last.device)
    if tower.config.pool == "cls":
        shares[0] = 1.0
    elif isinstance(tower.pool, AttentionPool):
        weights = pool_weights(tower.pool, pool_input(tower, image))
        shares[image.num_prefix :] = weights.double().mean(0)
    else:
        shares[image.num_prefix :] = 1 / len(image.positions)
    return shares


def _through(
    block: Block, x: Float[Tensor, "n D"], row: Float[Tensor, " n"], chunk_values: int
) -> Float[Tensor, " n"]:
    """Multiply a row by a block's attention, averaged over its heads."""
    found = torch.zeros_like(row)
    for start, weights in attention_rows(block, x, chunk_values=chunk_values):
        mean = weights.mean(0)
        found += (row[start : start + len(mean)].to(mean.dtype) @ mean).double()
    return found
