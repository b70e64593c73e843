"""Encoded photographs to patches: our image path against the plain Pillow chain, one thread.

Both get the same bytes and the same grids and give all patches of the grid. The chain goes on to
normalised float32, as its users do; ours stays uint8, since normalisation happens on the device.
"""

import argparse
import tarfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import paired_ratio
from packer.config import PackerConfig
from packer.decode import read_size
from packer.patchify import image_patches
from packer.plan.image import plan_image
from tests.reference import pillow_chain

PATCH_SIZE = 16
BUDGETS = (64, 256, 1024)


def run(quick: bool = False, photos: Path | None = None) -> list[dict[str, Any]]:
    """Measure at each token budget.

    Args:
        quick: A few images and pairs, to see that it runs.
        photos: A tar whose JPEGs are used; None generates photo-like ones of 640 x 480 pixels.

    Returns:
        Rows with the paired time ratio to the Pillow chain and milliseconds per image.
    """
    count, pairs = (4, 2) if quick else (50, 20)
    images = _photos(photos, count) if photos else _generated(count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(images, budget, pairs, photos) for budget in BUDGETS]
    finally:
        torch.set_num_threads(threads)


def _measure(images: list[bytes], budget: int, pairs: int, photos: Path | None) -> dict[str, Any]:
    config = PackerConfig(patch_size=PATCH_SIZE, seq_len=1024, max_tokens=budget)
    ours = partial(_each, images, partial(_our_path, config))
    chain = partial(_each, images, lambda data: pillow_chain.patches(data, PATCH_SIZE, budget))
    against_chain = paired_ratio(ours, chain, pairs=pairs)
    # What is left if nothing but Pillow's full decoding is counted.
    decoding = paired_ratio(partial(_each, images, _decode_only), chain, pairs=pairs)
    per_image = 1000 / len(images)
    return {
        "name": "image_path",
        "photos": photos.name if photos else "generated 640x480",
        "images": len(images),
        "max_tokens": budget,
        "ratio_to_pillow_chain": against_chain,
        "full_decode_to_pillow_chain": decoding,
        "ours_ms": against_chain.seconds_a * per_image,
        "chain_ms": against_chain.seconds_b * per_image,
        "full_decode_ms": decoding.seconds_a * per_image,
    }


def _each(images: list[bytes], function: Callable[[bytes], object]) -> None:
    for data in images:
        function(data)


def _our_path(config: PackerConfig, data: bytes) -> torch.Tensor:
    info = read_size(data, max_pixels=config.max_pixels)
    return image_patches(data, info, plan_image("photo", info.size, config), decode=config.decode)


def _decode_only(data: bytes) -> None:
    Image.open(BytesIO(data)).load()


def _photos(path: Path, count: int) -> list[bytes]:
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith((".jpg", ".jpeg"))]
        return [tar.extractfile(member).read() for member in members[:count]]


def _generated(count: int) -> list[bytes]:
    """Draw smooth colour fields with fine grain: JPEGs of about the size of real photographs."""
    images = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 6, (480, 640, 1))
        image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a tar of JPEGs")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    for row in run(arguments.quick, arguments.photos):
        for column, value in row.items():
            print(f"{column:30} {value}")
        print()
