"""What a cascade costs: operations of an image at a stage, expected and actual."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from navit.cascade.outcomes import check_fractions
from navit.cascade.stage import Stage
from navit.model import CLIP, NaViT
from navit.model.classifier import Classifier
from navit.model.flops import head_flops, image_flops


def stage_flops(
    stage: Stage, tokens: Sequence[int] | npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the operations a stage spends on images of so many tokens, each by itself.

    Args:
        stage: A stage with a `Classifier` or a `CLIP`.
        tokens: Tokens of each of the N images; 0 for one that the stage does not see.

    Returns:
        (N,) floating-point operations, two for each multiply-add of a matrix product, the head or
        the comparison with the class vectors included. What a batch costs whatever is in it is left
        out.

    Raises:
        ValueError: If the model is of another kind.
    """
    model = stage.model
    if isinstance(model, Classifier):
        head = head_flops(model.config)
    elif isinstance(model, CLIP):
        assert stage.classes is not None, "a stage checks it"
        width = model.config.embed_dim
        head = 2 * width * len(stage.classes)
        head += 2 * model.config.vision.width * width if model.config.image_projection else 0
    else:
        raise ValueError(
            f"operations are counted of a Classifier or a CLIP; got {type(model).__name__}. Count "
            "tokens instead."
        )
    tower: NaViT = model.vision
    config = replace(tower.config, patch_size=stage.packing.patch_size, patch_buffer=None)
    once = image_flops(config, [])
    lengths = np.asarray(tokens, np.int64)
    known = {0: 0}
    for length in np.unique(lengths[lengths > 0]).tolist():
        known[length] = image_flops(config, [length]) - once + head
    return np.array([known[length] for length in lengths.tolist()], np.int64)


def cascade_flops(stages: Sequence[Stage], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the operations a cascade spent on each image.

    Args:
        stages: Its K stages.
        tokens: (N, K) tokens each image had at each stage, 0 where it was not run
            (`CascadeOutput.tokens`).

    Returns:
        (N,) operations.
    """
    spent = [stage_flops(stage, tokens[:, k]) for k, stage in enumerate(stages)]
    total: npt.NDArray[np.int64] = np.sum(spent, axis=0, dtype=np.int64)
    return total


def expected_cost(exit_fractions: Sequence[float], stage_costs: Sequence[float]) -> float:
    """Return the mean cost of an image: each pays for its stage and all before it.

    Args:
        exit_fractions: Share of the images that leaves at each of the K stages.
        stage_costs: Cost of running each stage once.

    Raises:
        ValueError: If the two differ in length, or the shares do not sum to 1.
    """
    shares = check_fractions(exit_fractions)
    if len(shares) != len(stage_costs):
        raise ValueError(
            f"there must be one cost a stage; got {len(stage_costs)} for {len(shares)} stages."
        )
    return float(np.dot(shares, np.cumsum(np.asarray(stage_costs, np.float64))))
