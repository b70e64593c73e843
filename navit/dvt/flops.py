"""Operations of a dynamic transformer, image by image and stage by stage."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from navit.dvt.config import DVTConfig
from navit.dvt.resample import Grid
from navit.dvt.reuse import reuse_flops
from navit.model.flops import image_flops


def dvt_flops(config: DVTConfig, grids: Sequence[Sequence[Grid]]) -> npt.NDArray[np.int64]:
    """Return what each stage spends on each image, tower, exit and reuse modules together.

    Args:
        config: The model.
        grids: (rows, cols) of N images at each of the first K stages.

    Returns:
        (K, N) floating-point operations, two for each multiply-add; an image that leaves at a stage
        costs the sum up to it. What a batch costs whatever is in it is left out.

    Raises:
        ValueError: If the stages have different numbers of images.
    """
    if len({len(stage) for stage in grids}) > 1:
        raise ValueError(
            f"Every stage must have a grid for each image; got {[len(s) for s in grids]} grids."
        )
    once = image_flops(config.vision, [])
    head = 2 * config.vision.width * config.num_classes
    costs = [
        [image_flops(config.vision, [rows * cols]) - once + head for rows, cols in stage]
        for stage in grids
    ]
    for k in range(1, len(grids)):
        for i, (old, new) in enumerate(zip(grids[k - 1], grids[k], strict=True)):
            costs[k][i] += reuse_flops(config, old, new)
    return np.array(costs, dtype=np.int64)
