"""How alike the position embeddings of a grid are."""

from collections.abc import Sequence
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from navit.model import NaViT

Place = tuple[int, int]


def position_similarity(
    tower: NaViT, grid: tuple[int, int], places: Sequence[Place] | None = None
) -> Float[Tensor, "K rows cols"]:
    """Compare the embedding of some places with that of every place of a grid.

    Args:
        tower: Of any kind of position embedding.
        grid: (rows, cols) in patches.
        places: (row, col) of the K places; None takes all, row by row.

    Returns:
        Cosine similarities in float32, K * rows * cols of them.

    Source: ViT (arXiv:2010.11929), section 4.5, figure 7 centre.
    """
    rows, cols = grid
    device = next(tower.pos_embed.parameters()).device
    every = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).view(-1, 2).int()
    with torch.no_grad():
        sides = torch.tensor([rows, cols], dtype=torch.int32).expand(len(every), 2)
        vectors = F.normalize(tower.pos_embed(every.to(device), sides.to(device)).float(), dim=1)
    chosen = vectors
    if places is not None:
        chosen = vectors[torch.tensor([row * cols + col for row, col in places], device=device)]
    return (chosen @ vectors.T).view(-1, rows, cols).cpu()


def grids_of(tokens: int) -> list[tuple[int, int]]:
    """Return a square, a wide and a tall grid of at most so many patches each."""
    side, short = isqrt(tokens), max(isqrt(tokens // 2), 1)
    grids = [(side, side), (short, max(tokens // short, 1)), (max(tokens // short, 1), short)]
    return list(dict.fromkeys(grids))


def spread_places(grid: tuple[int, int], most: int = 7) -> tuple[list[int], list[int]]:
    """Return rows and columns spread evenly over a grid, with its edges, at most so many each."""
    rows, cols = (
        sorted({round(x) for x in torch.linspace(0, side - 1, min(side, most)).tolist()})
        for side in grid
    )
    return rows, cols
