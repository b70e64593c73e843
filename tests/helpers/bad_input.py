"""A bad sample between good ones, through a shard and a stream, and what came out."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from packer.batch import BatchStats, PackedBatch
from packer.config import PackerConfig
from packer.stream import PackedStream
from tests.helpers.samples import Unpacked, drain, naive_patches, noise, png, unpack

P = 8
NEIGHBOURS = ("a0", "a1", "z0", "z1")
"""Keys of the good samples: two before the bad one, "b", and two after it."""

Members = list[tuple[str, bytes]]


def config(**options: Any) -> PackerConfig:
    return PackerConfig(**{"patch_size": P, "seq_len": 64} | options)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def good(key: str) -> dict[str, Any]:
    return {"key": key, "image": png(2 * P, P, ord(key[-1])), "caption": f"good {key}"}


def image(data: bytes) -> dict[str, Any]:
    """Return a bad sample's image and a caption."""
    return {"image": data, "caption": "the bad one"}


def members_of(sample: dict[str, Any], extension: str = "jpg") -> Members:
    """List a sample's files; Pillow finds the format in the bytes, whatever the name says."""
    caption = sample.get("caption")
    text = caption.encode() if isinstance(caption, str) else caption
    found = [(f"{sample['key']}.{extension}", sample["image"])]
    return found if text is None else [*found, (f"{sample['key']}.txt", text)]


def between(members: Members) -> Members:
    """Put members between those of two good samples on either side."""
    around = [members_of(good(key)) for key in NEIGHBOURS]
    return [*around[0], *around[1], *members, *around[2], *around[3]]


def write_tar(path: Path, members: Members) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@dataclass(frozen=True)
class Outcome:
    """What came out of a run: images and captions by bare key, and the counts."""

    images: dict[str, Unpacked]
    texts: dict[str, str]
    stats: BatchStats

    def pixels(self, key: str) -> np.ndarray:
        """Put an undropped image's patches together again: uint8 (H, W, 3)."""
        rows, cols = self.images[key].grid
        cells = self.images[key].patches.numpy().reshape(rows, cols, P, P, 3)
        return cells.transpose(0, 2, 1, 3, 4).reshape(rows * P, cols * P, 3)


def outcome(batches: Sequence[PackedBatch]) -> Outcome:
    images: dict[str, Unpacked] = {}
    texts: dict[str, str] = {}
    stats = BatchStats()
    for batch in batches:
        batch.check()
        for key, text in zip(batch.keys, batch.texts or (), strict=True):
            texts[key.partition("/")[2] or key] = text
        images |= {key.partition("/")[2] or key: image for key, image in unpack(batch).items()}
        stats += batch.stats
    assert stats.images + sum(stats.skipped.values()) == stats.samples_read
    assert stats.images == len(images)
    return Outcome(images, texts, stats)


def check_neighbours(found: Outcome, keys: Sequence[str] = NEIGHBOURS) -> None:
    for key in keys:
        expected = naive_patches(noise(2 * P, P, ord(key[-1])), found.images[key].positions, P)
        assert torch.equal(found.images[key].patches, expected)
        assert found.texts[key] == f"good {key}"


def stream(shards: str | list[str], settings: PackerConfig, **options: Any) -> Outcome:
    """Read shards once, in order."""
    opened = PackedStream(
        shards, settings, sequences_per_batch=2, epochs=1, shuffle_shards=False, **options
    )
    return outcome(drain(DataLoader(opened, batch_size=None)))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Lay RGBA pixels on white."""
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))


def grey(values: np.ndarray) -> np.ndarray:
    """Repeat grey values as RGB."""
    return np.repeat(values[..., None], 3, axis=2)


def colour_modes() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Name -> file, RGB pixels expected, levels they may be off."""
    rng = np.random.default_rng(5)
    size = (2 * P, 2 * P)
    rgba = rng.integers(0, 256, (*size, 4), dtype=np.uint8)
    luma, bits = rgba[..., 0], rgba[..., 0] > 127
    deep = rng.integers(0, 65536, size, dtype=np.uint16)
    palette = Image.fromarray(luma % 4).convert("P")
    colours = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    palette.putpalette(colours.tobytes())
    la = Image.merge("LA", [Image.fromarray(rgba[..., i]) for i in (0, 3)])
    cmyk = Image.new("CMYK", size, (0, 255, 255, 0))
    return {
        "CMYK": (encode(cmyk, "JPEG"), np.broadcast_to([255, 0, 0], (*size, 3)), 15),
        "palette": (encode(palette), colours[luma % 4], 0),
        "LA": (encode(la), on_white(np.dstack([grey(luma), rgba[..., 3]])), 1),
        "1-bit": (encode(Image.fromarray(bits)), grey(bits * 255), 0),
        "16-bit grey": (encode(Image.fromarray(deep)), grey(deep >> 8), 0),
        "alpha": (encode(Image.fromarray(rgba)), on_white(rgba), 1),
    }
