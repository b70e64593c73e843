"""Encoded images to patches, one thread: ours beside HF's and timm's NaFlex and plain Pillow.

Each comparison gives both sides the same bytes and the same grids: those of HF and timm are ours
with ``resize="fill_budget"``, the Pillow chain's are ours with the default. All give every patch
of the grid. The others go on to normalised float32, as their users do; ours stays uint8, since
normalisation happens on the device. HF and timm resize the whole image, ours may decode a JPEG
reduced (``decode="reduced"``): the differences of the pixels are in the rows.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import peers
from benchmarks.harness import Paired, paired_ratio
from packer.config import PackerConfig
from packer.decode import ImageInfo, decode_rgb, read_size
from packer.patchify import image_patches, resize_uint8
from packer.plan.image import plan_image
from packer.plan.types import ImagePlan
from tests.reference import pillow_chain

PATCH_SIZE = 16
BUDGETS = (64, 256, 1024)
_MEAN = {"hf_torchvision": (0.5, 0.5, 0.5), "timm": (0.485, 0.456, 0.406)}
_STD = {"hf_torchvision": (0.5, 0.5, 0.5), "timm": (0.229, 0.224, 0.225)}


def run(quick: bool = False, photos: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Measure at each token budget, photographs and figures apart.

    Args:
        quick: A few images and pairs, to see that it runs.
        photos: Tars or folders whose JPEGs are used; none generates photo-like ones of
            640 x 480 pixels.

    Returns:
        Rows with paired time ratios and milliseconds per image.
    """
    count, pairs = (4, 2) if quick else (50, 10)
    groups = _given(photos, count) if photos else {"generated 640x480": generated(count)}
    names = [name for name, package in peers.PREPARERS.items() if peers.is_there(package)]
    if left_out := peers.missing(peers.PREPARERS):
        print(left_out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for kind, images in groups.items():
            for budget in BUDGETS:
                rows.append(_measure(images, budget, names, pairs) | {"kind": kind})
                _print_row(rows[-1])
    finally:
        torch.set_num_threads(threads)
    return rows


def _measure(
    images: Sequence[bytes], budget: int, names: Sequence[str], pairs: int
) -> dict[str, Any]:
    config = PackerConfig(
        patch_size=PATCH_SIZE, seq_len=1024, max_tokens=budget, resize="fill_budget"
    )
    ours = partial(_ours, config)
    infos = [read_size(data) for data in images]
    plans = [plan_image("photo", info.size, config) for info in infos]
    planned = dict(zip(images, zip(infos, plans, strict=True), strict=True))

    def versus(function: Callable[[bytes], object], base: Callable[[bytes], object]) -> Paired:
        return paired_ratio(
            partial(_each, images, function), partial(_each, images, base), pairs=pairs
        )

    row: dict[str, Any] = {"images": len(images), "max_tokens": budget}
    row["megapixels"] = sum(info.size.height * info.size.width for info in infos) / 1e6 / len(infos)
    for name in names:
        peer = peers.preparer(name, budget)
        row[f"speed_to_{name}"] = versus(peer, ours)
        row |= _difference(name, images, peer, ours)
    chain = partial(pillow_chain.patches, patch_size=PATCH_SIZE, max_tokens=budget)
    own_grids = PackerConfig(patch_size=PATCH_SIZE, seq_len=1024, max_tokens=budget)
    row["speed_to_pillow"] = versus(chain, partial(_ours, own_grids))
    row["full_decode_share"] = versus(_decode_only, ours)
    row["decode_share"] = versus(lambda data: _decode_only(data, *planned[data]), ours)
    row["decode_resize_share"] = versus(lambda data: _decode_resize(data, *planned[data]), ours)
    per_image = 1000 / len(images)
    row["ours_ms"] = row["decode_share"].seconds_b * per_image
    row["decode_ms"] = row["decode_share"].seconds_a * per_image
    row["full_decode_ms"] = row["full_decode_share"].seconds_a * per_image
    return row


def _each(images: Sequence[bytes], function: Callable[[bytes], object]) -> None:
    for data in images:
        function(data)


def _ours(config: PackerConfig, data: bytes) -> torch.Tensor:
    info = read_size(data, max_pixels=config.max_pixels)
    return image_patches(data, info, plan_image("photo", info.size, config), decode=config.decode)


def _decode_only(
    data: bytes, info: ImageInfo | None = None, plan: ImagePlan | None = None
) -> Image.Image:
    """Let Pillow decode, at the scale our path chooses for the plan, and do nothing else."""
    image = Image.open(BytesIO(data))
    if info is not None and plan is not None:
        sides = plan.grid.rows * PATCH_SIZE, plan.grid.cols * PATCH_SIZE
        height, width = info.size
        for scale in (8, 4, 2):
            if height // scale >= 2 * sides[0] and width // scale >= 2 * sides[1]:
                image.draft(None, (width // scale, height // scale))
                break
    image.load()
    return image


def _decode_resize(data: bytes, info: ImageInfo, plan: ImagePlan) -> torch.Tensor:
    height, width = plan.grid.rows * PATCH_SIZE, plan.grid.cols * PATCH_SIZE
    return resize_uint8(decode_rgb(data, info, grid_pixels=(height, width)), height, width)


def _difference(
    name: str,
    images: Sequence[bytes],
    peer: peers.Prepare,
    ours: Callable[[bytes], torch.Tensor],
) -> dict[str, float]:
    """Compare pixel values in levels of 0..255; that the shapes agree says the grids do."""
    mean = torch.tensor(_MEAN[name]).repeat(PATCH_SIZE**2)
    std = torch.tensor(_STD[name]).repeat(PATCH_SIZE**2)
    apart = [((peer(data) * std + mean) * 255 - ours(data)).abs().flatten() for data in images]
    levels = torch.cat(apart).numpy()
    return {
        f"mean_levels_to_{name}": float(levels.mean()),
        f"p99_levels_to_{name}": float(np.quantile(levels, 0.99)),
    }


def _print_row(row: dict[str, Any]) -> None:
    print(
        f"\n{row['kind']}: {row['images']} images of {row['megapixels']:.2f} Mpx, "
        f"{row['max_tokens']} tokens: {row['ours_ms']:.2f} ms an image, of which decoding "
        f"{row['decode_ms']:.2f} (in full {row['full_decode_ms']:.2f})"
    )
    for name, value in row.items():
        if name.startswith("speed_to_"):
            print(f"  times the speed of {name.removeprefix('speed_to_'):15} {value}")
        elif name.endswith("_share"):
            print(f"  {name.removesuffix('_share').replace('_', ' '):14} / our time     {value}")
        elif "_levels_to_" in name:
            print(f"  {name.replace('_', ' '):33} {value:.2f}")
    print(f"  left after decode and resize      {1 - row['decode_resize_share'].ratio:.3f}")


def jpegs(paths: Sequence[Path], *, original: bool = True) -> Iterator[bytes]:
    """Read the upright RGB JPEGs that tars and folders hold.

    Args:
        paths: Tars or folders.
        original: Whether those are left out that are said to have been scaled or encoded anew.
    """
    return (data for _, data in _jpegs(paths, original=original))


def _given(paths: Sequence[Path], count: int) -> dict[str, list[bytes]]:
    """Read the first ``count`` JPEGs of each kind."""
    groups: dict[str, list[bytes]] = {"photographs": [], "figures": []}
    for kind, data in _jpegs(paths):
        if len(groups[kind]) < count:
            groups[kind].append(data)
    found = {kind: images for kind, images in groups.items() if images}
    if not found:
        raise ValueError(
            f"photos must hold RGB JPEGs of original size; {', '.join(map(str, paths))} hold none."
        )
    return found


def _jpegs(paths: Sequence[Path], *, original: bool = True) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        for kind, data in _members(path, original=original) if path.is_file() else _files(path):
            try:
                image = Image.open(BytesIO(data), formats=["JPEG"])
            except OSError:
                continue
            # HF and timm leave EXIF orientation alone, so that a turned image has another grid.
            if image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1:
                yield kind, data


def _members(path: Path, *, original: bool) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
        for name, member in members.items():
            stem, _, extension = name.rpartition(".")
            if extension not in ("jpg", "jpeg"):
                continue
            about = members.get(f"{stem}.json")
            said = json.loads(_content(tar, about)) if about else {}
            if not original or said.get("bytes", "original") == "original":
                yield _kind(said.get("set", name)), _content(tar, member)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "images and their descriptions are files"
    return file.read()


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jpg", ".jpeg"):
            yield _kind(path.name), path.read_bytes()


def _kind(name: str) -> str:
    return "figures" if "openstax" in name else "photographs"


def generated(count: int, size: tuple[int, int] = (640, 480)) -> list[bytes]:
    """Draw smooth colour fields with fine grain: JPEGs of about the size of real photographs."""
    images = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 6, (*size[::-1], 1))
        image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images
