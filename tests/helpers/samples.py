"""Small images, shards and comparisons for tests of the data side."""

import io
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from packer.batch import PackedBatch, PackedText
from packer.shards import write_shards

BROKEN = b"\xff\xd8\xff\xe0 this is no JPEG"
"""Begins like a JPEG; not even its header can be read."""


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw a uint8 (height, width, 3) image of noise: no two of its patches are alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode pixels without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def png(height: int, width: int, seed: int = 0) -> bytes:
    """Encode `noise` without loss."""
    return encode_png(noise(height, width, seed))


def cut_png(height: int = 32, width: int = 32, seed: int = 0) -> bytes:
    """Return a PNG whose header is whole and whose pixels are cut: it fails after placement."""
    return png(height, width, seed)[:200]


def image_samples(count: int, *, unit: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Make captioned, labelled samples of 1 to 5 units a side, key ``"000"`` upwards."""
    sides = np.random.default_rng(seed).integers(1, 6, (count, 2)) * unit
    return [
        {
            "key": f"{i:03d}",
            "image": png(height, width, seed * 1000 + i),
            "caption": f"picture number {i}",
            "label": i,
        }
        for i, (height, width) in enumerate(sides.tolist())
    ]


def sizes_of(samples: Iterable[dict[str, Any]]) -> np.ndarray:
    """Return (height, width) of encoded samples without EXIF, as Pillow finds them."""
    opened = [Image.open(io.BytesIO(sample["image"])) for sample in samples]
    return np.array([(image.height, image.width) for image in opened])


def make_shards(folder: Path, samples: Iterable[dict[str, Any]], per_shard: int) -> list[str]:
    """Write samples to ``folder/s-00000.tar`` upwards."""
    return write_shards(samples, folder / "s-%05d.tar", samples_per_shard=per_shard)


class Unpacked(NamedTuple):
    """One image as it lies in a batch."""

    grid: tuple[int, int]
    positions: Tensor
    patches: Tensor


def unpack(batch: PackedBatch) -> dict[str, Unpacked]:
    """Collect each image's tokens by key, reading the per-token tensors alone."""
    found = {}
    for b, slots in enumerate(batch.image_index.tolist()):
        for slot, index in enumerate(slots):
            if index >= 0:
                tokens = batch.segment_ids[b] == slot + 1
                found[batch.keys[index]] = Unpacked(
                    tuple(batch.grid_sizes[b, slot].tolist()),
                    batch.position_ids[b, tokens],
                    batch.patches[b, tokens],
                )
    return found


def naive_patches(pixels: np.ndarray, positions: Tensor, patch_size: int) -> Tensor:
    """Cut patches out of an image one by one: the reference for `patches`."""
    p = patch_size
    return torch.stack(
        [
            torch.from_numpy(pixels[r * p : (r + 1) * p, c * p : (c + 1) * p].copy()).flatten()
            for r, c in positions.tolist()
        ]
    )


def drain(loader: DataLoader[Any], limit: int | None = None) -> list[PackedBatch]:
    """List the first batches of a loader; torch would wait 5 s for a worker that raised."""
    iterator = iter(loader)
    try:
        return list(islice(iterator, limit))
    except Exception:
        for worker in getattr(iterator, "_workers", ()):
            worker.terminate()
        raise


def assert_same(a: Any, b: Any, *, ignore: Iterable[str] = ()) -> None:
    """Compare two batches field by field, bit by bit; stats and state included."""
    for item in fields(a):
        if item.name in ignore:
            continue
        x, y = getattr(a, item.name), getattr(b, item.name)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype, item.name
            assert torch.equal(x, y), item.name
        elif isinstance(x, PackedText):
            assert_same(x, y)
        else:
            assert x == y, item.name


def assert_same_batches(
    a: Iterable[PackedBatch], b: Iterable[PackedBatch], *, ignore: Iterable[str] = ()
) -> None:
    """Compare two runs of batches."""
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y, ignore=ignore)
