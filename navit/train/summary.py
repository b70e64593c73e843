"""What is printed and drawn when a run ends."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from navit.evaluate.encode import EncodedPairs
from navit.evaluate.report import format_metrics
from navit.evaluate.run import Evaluation
from navit.train.loop import TrainResult
from navit.train.metrics import read_metrics
from navit.train.pictures import draw_loss, draw_masked, draw_retrieval
from packer.decode import decode_rgb, read_size
from packer.patchify import resize_uint8
from packer.shards import IMAGE_EXTENSIONS, iter_shard
from packer.tally import tally_text

MAX_GALLERY = 1000
"""Validation pairs that retrieval.png draws from, the first ones."""
THUMBNAIL = 160
"""Longest side in pixels of the images kept for it."""


def draw_results(result: TrainResult, val_shards: Sequence[str]) -> list[Path]:
    """Draw loss.png, retrieval.png or masked.png of a finished run; return all its pictures."""
    run = result.run
    if any(line["event"] == "train" for line in read_metrics(run / "metrics.jsonl")):
        draw_loss(run / "metrics.jsonl", run / "loss.png")
    if result.evaluation is not None and result.evaluation.pairs is not None:
        draw_nearest(result.evaluation.pairs, val_shards, run / "retrieval.png")
    if result.evaluation is not None and result.evaluation.examples:
        draw_masked(result.evaluation.examples, run / "masked.png")
    names = ("loss.png", "packing.png", "retrieval.png", "masked.png")
    return [run / name for name in names if (run / name).exists()]


def draw_nearest(pairs: EncodedPairs, shards: Sequence[str], path: Path) -> None:
    """Draw captions, spread over the validation pairs, with the images nearest to them."""
    count = min(MAX_GALLERY, len(pairs.keys))
    pixels = _read_images(set(pairs.keys[:count]), shards)
    similarity = pairs.text[:count] @ pairs.image[:count].T
    images = [pixels[key] for key in pairs.keys[:count]]
    draw_retrieval(images, pairs.texts[:count], similarity, path)


def format_evaluation(found: Evaluation) -> str:
    """Lay out what an evaluation found, of image-text pairs or of classes."""
    if found.pairs is not None:
        return format_metrics(found.metrics, title=f"{len(found.pairs.keys):,} pairs")
    return format_metrics(found.metrics, title=f"{found.stats.images:,} images")


def format_run(result: TrainResult) -> str:
    """Lay out what a run ended with: quality, packing, speed, what was skipped."""
    stats = result.stats
    parts = [f"{result.run}: {result.step:,} steps, {stats.images:,} images"]
    if result.evaluation is not None:
        parts.append(format_evaluation(result.evaluation))
    parts.append(
        f"{'images/s':<34}{result.images_per_second:>8,.0f}\n"
        f"{'kept tokens/s':<34}{result.tokens_per_second:>8,.0f}"
    )
    parts.append(tally_text(stats))
    parts.append(f"checkpoint: {result.checkpoint}")
    return "\n\n".join(parts)


def _thumbnail(data: bytes) -> npt.NDArray[np.uint8]:
    # Every image here was encoded before, so the run's own limits have let it pass.
    info = read_size(data, max_pixels=sys.maxsize)
    scale = min(1.0, THUMBNAIL / max(info.size))
    height, width = (max(1, round(side * scale)) for side in info.size)
    pixels = decode_rgb(data, info, grid_pixels=(height, width), keep_truncated=True)
    return resize_uint8(pixels, height, width).numpy()


def _read_images(keys: set[str], shards: Sequence[str]) -> dict[str, npt.NDArray[np.uint8]]:
    """Decode the images of some keys: uint8 (H, W, 3) arrays."""
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for shard in shards:
        for raw in iter_shard(shard, on_problem=lambda cause, detail: None):
            if raw.key in keys:
                data = next(raw.members[name] for name in IMAGE_EXTENSIONS if name in raw.members)
                found[raw.key] = _thumbnail(data)
        if len(found) == len(keys):
            break
    return found
