"""Lone objects of drawn scenes, their colour and fill, or their place, as the class.

A few tokens show the colour, more of them the pattern. Shapes are left out: from scratch they take
more steps than this experiment has.
"""

import random
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from packer.demo import Scene, draw_image, draw_scene
from packer.demo.scene import COLOURS, FILLS
from packer.plan.types import ImageSize

SIDES = ((96, 96), (84, 112), (112, 84), (78, 118), (118, 78))
"""Height and width in pixels: five native aspects of about equal area, hence few buckets."""
NUM_CLASSES = len(COLOURS) * len(FILLS)
LOW, HIGH = 0.3, 0.7
"""Where the centre of an object is, as shares of width and height."""
CELLS = 4
"""Places are told apart on a grid of so many rows and columns."""


def draw_objects(
    count: int, *, seed: int, label: Literal["look", "place"] = "look", progress: bool = True
) -> list[dict[str, Any]]:
    """Draw labelled samples: one object somewhere on a textured background.

    Args:
        count: How many.
        seed: Of the scenes; training and test images have different ones.
        label: "look": colour and fill, `NUM_CLASSES`; "place": the cell of the object's centre,
            `CELLS` squared.
        progress: Whether a progress bar is shown.

    Returns:
        Samples as `packer.sample.as_sample` reads them; uint8 images and labels.
    """
    samples = []
    for index in tqdm(range(count), desc=f"drawing {count:,} images", disable=not progress):
        rng = random.Random(f"{seed}/{index}")
        scene = draw_scene(rng)
        item = replace(
            scene.objects[0],
            x=rng.uniform(LOW, HIGH),
            y=rng.uniform(LOW, HIGH),
            diameter=rng.uniform(0.3, 0.6),
        )
        alone = Scene((item,), "middle", "", scene.background, scene.texture, scene.texture_seed)
        image = draw_image(alone, ImageSize(*rng.choice(SIDES)))
        number = tuple(COLOURS).index(item.colour) * len(FILLS) + FILLS.index(item.fill)
        if label == "place":
            row, col = (int((at - LOW) / (HIGH - LOW) * CELLS) for at in (item.y, item.x))
            number = min(row, CELLS - 1) * CELLS + min(col, CELLS - 1)
        samples.append({"key": f"{seed}-{index:06d}", "image": np.asarray(image), "label": number})
    return samples
