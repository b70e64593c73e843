"""The same images at several stages: random pixels on grids that are given or drawn."""

from collections.abc import Sequence

import torch

from tests.helpers.batches import RandomImage, random_image

Grids = list[list[tuple[int, int]]]


def stage_images(grids: Grids, *, seed: int, patch_size: int = 4) -> list[list[RandomImage]]:
    """Draw an image of random pixels for each grid of each stage."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [random_image(*grid, patch_size=patch_size, generator=generator) for grid in stage]
        for stage in grids
    ]


def random_grids(count: int, *, seed: int, sides: Sequence[int] = (2, 3, 4)) -> Grids:
    """Draw grids of images whose sides may grow from stage to stage, up to each stage's limit."""
    generator = torch.Generator().manual_seed(seed)
    grids: Grids = []
    for side in sides:
        drawn = torch.randint(1, side + 1, (count, 2), generator=generator)
        if grids:
            drawn = torch.maximum(drawn, torch.tensor(grids[-1]).view(-1, 2))
        grids.append([(int(rows), int(cols)) for rows, cols in drawn.tolist()])
    return grids
