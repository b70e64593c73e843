"""Damaged images and tars by the thousand: each gives a batch or a counted skip, soon, and no more.

Seeded: input i of a test is the same in every run, and a failure says which it was.
"""

import gc
import io
import os
import signal
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from packer.batch import BatchStats, PackedBatch
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.errors import CAUSES, NOTED_CAUSES
from packer.plan.drop import BetaDrop
from packer.plan.resize import RandomCrop
from packer.stream import PackedStream
from tests.helpers.damage import damage, gif, tiled_tiff
from tests.helpers.samples import Unpacked, naive_patches, noise, png, unpack

P = 8
MAX_PIXELS = 250_000
SECONDS = 20.0
"""An input takes milliseconds; the rest is for a machine that does other things beside."""
MEGABYTES = 256
"""What the memory may rise by at its peak: MAX_PIXELS in any form are 4 MB."""


class Hang(BaseException):
    """Not an Exception: what catches errors of a decoder must not catch this one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` after some seconds, where the system has such a timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise Hang(f"an input took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def open_files() -> int:
    """Count the open files of this process; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.exists() else 0


def peak_memory(*, restart: bool = False) -> int:
    """Return the peak of resident memory in MB, or count it anew; 0 where it is not told."""
    with suppress(OSError):
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) // 1024
    return 0


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Compare open files and peak memory before and after."""
    files, megabytes = open_files(), peak_memory(restart=True)
    yield
    risen = peak_memory() - megabytes
    gc.collect()
    assert open_files() <= files, "a file was left open"
    assert risen < MEGABYTES, f"the peak of memory rose by {risen} MB"


def total(batches: list[PackedBatch]) -> BatchStats:
    """Check batches and sum their counts."""
    for batch in batches:
        batch.check()
    stats = sum((batch.stats for batch in batches), BatchStats())
    assert stats.images + sum(stats.skipped.values()) == stats.samples_read
    assert stats.images == sum(batch.num_images for batch in batches)
    assert stats.skipped.keys() <= CAUSES.keys() - NOTED_CAUSES
    assert stats.noted.keys() <= NOTED_CAUSES
    return stats


# Images


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """Small files in every format and mode that is read."""
    Image.init()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 4, 3), dtype=np.uint8))
    rgb = coarse.resize((40, 56), Image.Resampling.BICUBIC)
    grey, rgba = rgb.convert("L"), rgb.convert("RGBA")
    rgba.putalpha(grey)
    cmyk, palette = rgb.convert("CMYK"), rgb.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    others = [Image.new("RGB", rgb.size, colour) for colour in ("red", "blue")]
    animated: dict[str, Any] = {"save_all": True, "append_images": others}
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "JPEG baseline": encode(rgb, "JPEG"),
        "JPEG with EXIF": encode(rgb, "JPEG", exif=exif, quality=95, subsampling=0),
        "JPEG progressive": encode(rgb, "JPEG", progressive=True, optimize=True),
        "JPEG grey": encode(grey, "JPEG", restart_marker_blocks=2),
        "JPEG CMYK": encode(cmyk, "JPEG"),
        "JPEG that can be reduced": encode(rgb.resize((160, 200)), "JPEG"),
        "MPO": encode(rgb, "MPO", **animated),
        "PNG RGB": encode(rgb, "PNG", exif=exif),
        "PNG palette": encode(palette, "PNG", transparency=3),
        "PNG RGBA": encode(rgba, "PNG"),
        "PNG LA": encode(rgba.convert("LA"), "PNG"),
        "PNG 1-bit": encode(grey.convert("1"), "PNG"),
        "PNG 16-bit": encode(deep, "PNG"),
        "PNG animated": encode(rgb, "PNG", **animated),
        "WebP": encode(rgb, "WEBP"),
        "WebP lossless": encode(rgba, "WEBP", lossless=True, exif=exif),
        "WebP animated": encode(rgb, "WEBP", **animated),
        "GIF": encode(palette, "GIF", transparency=1),
        "GIF animated": encode(rgb, "GIF", disposal=2, **animated),
        "GIF by hand": gif((40, 56), (40, 56), 2),
        "TIFF": encode(rgb, "TIFF"),
        "TIFF LZW": encode(rgba, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encode(cmyk, "TIFF", compression="tiff_deflate"),
        "TIFF JPEG": encode(rgb, "TIFF", compression="jpeg"),
        "TIFF PackBits": encode(palette, "TIFF", compression="packbits"),
        "TIFF group 4": encode(grey.convert("1"), "TIFF", compression="group4"),
        "TIFF 16-bit": encode(deep, "TIFF", exif=exif),
        "TIFF float": encode(floats, "TIFF", compression="tiff_lzw"),
        "TIFF tiled": tiled_tiff(40, 64, encode(grey.resize((64, 64)), "PNG")[-900:]),
        "BMP": encode(rgb, "BMP"),
        "BMP palette": encode(palette, "BMP"),
        "BMP RGBA": encode(rgba, "BMP"),
        "PPM": encode(rgb, "PPM"),
        "PGM 16-bit": encode(deep, "PPM"),
        "PBM": encode(grey.convert("1"), "PPM"),
        "PPM plain": b"P3 8 8 255\n" + b" ".join(b"%d" % v for v in rng.integers(0, 256, 192)),
    }
    for kind in ("AVIF", "JPEG2000"):
        if kind in Image.SAVE:
            found |= {kind: encode(rgb, kind), f"{kind} RGBA": encode(rgba, kind)}
    return found


def settings() -> list[PackerConfig]:
    common: dict[str, Any] = {
        "patch_size": P,
        "seq_len": 32,
        "max_pixels": MAX_PIXELS,
        "max_failures_in_row": 10**9,
    }
    return [
        PackerConfig(**common),
        PackerConfig(**common, keep_truncated=True, max_tokens=6),
        PackerConfig(**common, decode="full", crop=RandomCrop(0.5)),
        PackerConfig(**common, resize="allow_enlarge", token_drop=BetaDrop(), max_tokens=12),
    ]


NEIGHBOURS = {"a": (2 * P, P), "z": (P, 2 * P)}


def check_images(count: int, seed: int) -> None:
    """Send damaged images through collators, each between two good ones."""
    files = images()
    names = list(files)
    collators = [PackingCollator(config) for config in settings()]
    good = {
        key: {"key": key, "image": png(*size), "caption": key} for key, size in NEIGHBOURS.items()
    }
    alone = [unpack(collate(list(good.values()))) for collate in collators]
    kept = 0
    with nothing_left_behind():
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            name, other = (names[int(i)] for i in rng.integers(0, len(names), 2))
            data = files[name]
            for _ in range(rng.integers(1, 4)):
                data = damage(data, files[other], rng)
            bad = as_given(data, as_pil=number % 5 == 0)
            chosen = number % len(collators)
            try:
                with time_limit(SECONDS):
                    batch = collators[chosen]([good["a"], bad, good["z"]])
                kept += check_neighbours(batch, alone[chosen])
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}: {name}, {data.hex()}")
                raise
    assert count / 10 < kept < count * 9 / 10, "some damage is noticed and some is not"


def as_given(data: bytes, *, as_pil: bool) -> dict[str, Any]:
    """Hand an image in as encoded bytes, or opened by Pillow and without a key where it can be."""
    if as_pil:
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            return {"image": Image.open(io.BytesIO(data)), "caption": "b"}
    return {"key": "b", "image": data, "caption": "b"}


def check_neighbours(batch: PackedBatch, alone: dict[str, Unpacked]) -> int:
    """Check a batch of two good images and perhaps a third; return how many came of that one."""
    stats = total([batch])
    assert stats.samples_read == 3
    assert batch.texts is not None
    assert [text for text in batch.texts if text != "b"] == list(NEIGHBOURS)
    found = unpack(batch)
    for key, expected in alone.items():
        assert found[key].grid == expected.grid
        assert torch.equal(found[key].positions, expected.positions)
        assert torch.equal(found[key].patches, expected.patches), "a neighbour changed"
    return stats.images - len(alone)


def test_a_damaged_image_is_kept_or_counted_and_its_neighbours_are_untouched() -> None:
    check_images(300, seed=1)


@pytest.mark.slow
def test_ten_thousand_damaged_images_are_kept_or_counted() -> None:
    check_images(10_000, seed=2)


# Tars

LONG = "folder/" * 20 + "ü" * 60
ODD_NAMES = (
    *("", ".", "..", "/", "a", ".jpg", "a.", "a..jpg", "./a.jpg", "../a.jpg", "/a.jpg", "a/.jpg"),
    *("a.JPG", "a.jpg.txt", "a b.jpg", "a\nb.jpg", "a\x1b[31m.jpg", "%s%d.jpg", "\udcff.jpg"),
    *(f"{LONG}.jpg", f"{LONG}.txt", "x" * 99 + ".jpg", "d/" * 300 + "a.jpg", "ä.jpg", "😀.txt"),
)
PAX_RECORDS = (
    *("11 size=²\n".encode(), b"11 size=-1\n", b"30 size=99999999999999999999\n", b"0 a=b\n"),
    *(b"9" * 500, b"99999 path=a\n", b"12 path=\xff.jpg\n", b"10 path=/\n", b"13 path=a.jpg\n"),
)
EXTENSIONS = ("jpg", "png", "txt", "cls", "json", "JPG")

Members = list[tuple[str, bytes]]


def caption_of(name: str) -> bytes:
    key = name.removeprefix("./").rpartition(".")[0]
    return b"of " + key.encode("utf-8", "surrogateescape")


def image_of(name: str) -> bytes:
    """Draw an image whose one patch tells which key it belongs to."""
    return png(P, P, sum(caption_of(name)))


def whole_members(rng: np.random.Generator) -> Members:
    members: Members = []
    for i in range(rng.integers(0, 6)):
        key = f"{i:03d}" if rng.integers(4) else f"{LONG}{i}"
        members += [
            (f"{key}.png", image_of(f"{key}.png")),
            (f"{key}.txt", caption_of(f"{key}.txt")),
        ]
    return members


def content(name: str, rng: np.random.Generator) -> bytes:
    """Return what a member of some name holds: what belongs to its key, or next to nothing."""
    extension = name.rpartition(".")[2].lower()
    if extension == "txt":
        return caption_of(name)
    if extension == "cls":
        return [b"3", b"-1", b"9" * 30, b"9" * 5000, b"x", b""][rng.integers(6)]
    return image_of(name)


def shuffle_members(members: Members, rng: np.random.Generator) -> Members:
    """Remove, repeat, move, rename or put in members."""
    members = list(members)
    for _ in range(rng.integers(1, 5)):
        at, to = (int(i) for i in rng.integers(0, len(members) + 1, 2))
        way = rng.integers(5)
        if way == 0:
            del members[at : at + 1]
        elif way == 1:
            members[to:to] = members[at : at + int(rng.integers(1, 4))]
        elif way == 2:
            moved = members[at : at + 1]
            del members[at : at + 1]
            members[to:to] = moved
        else:
            name = str(rng.choice(np.array(ODD_NAMES, dtype=object)))
            if way == 3 and members:
                stem = members[at % len(members)][0].rpartition(".")[0]
                name = f"{stem}.{rng.choice(EXTENSIONS)}"
            members[to:to] = [(name, content(name, rng))]
    return members


def make_tar(members: Members, rng: np.random.Generator) -> bytes:
    kind = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[rng.integers(3)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name too long for ustar
                continue
    return buffer.getvalue()


def set_header(data: bytes, rng: np.random.Generator) -> bytes:
    """Set the size or type of a member to something else, under a checksum that fits."""
    # By the mark of a header: the standard library ends with an OverflowError on some of these.
    offsets = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not offsets:
        return data
    at = int(rng.choice(offsets))
    block, rest = bytearray(data[at : at + 512]), bytearray(data[at + 512 :])
    if block[156:157] == tarfile.XHDTYPE:
        record = PAX_RECORDS[rng.integers(len(PAX_RECORDS))]
        rest[: len(record)] = record
    elif rng.integers(2):
        sizes = (b"77777777777\0", b"\xff" * 12, b"\x80" + b"\0" * 11, b"\x80" + b"\xff" * 11)
        block[124:136] = (*sizes, b"00000000000\0", b"%011o\0" % rng.integers(4096))[
            rng.integers(6)
        ]
    else:
        block[156] = int(rng.choice([*b"01234567LKxgSVDM\0"]))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + bytes(rest)


def read_tar(path: Path, config: PackerConfig, number: int) -> list[PackedBatch]:
    stream = PackedStream(
        [path],
        config,
        sequences_per_batch=1 + number % 2,
        epochs=1,
        shuffle_window=1 + number % 5,
        need="label" if number % 3 == 0 else "caption",
        num_streams=1 + number % 2,
    )
    with time_limit(SECONDS):
        return list(stream)


def check_tars(count: int, seed: int, folder: Path) -> None:
    path, configs = folder / "s.tar", settings()
    kept = read = 0
    with nothing_left_behind():
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            members = whole_members(rng)
            if rng.integers(2):
                members = shuffle_members(members, rng)
            data, other = make_tar(members, rng), make_tar(whole_members(rng), rng)
            structural = not rng.integers(3)
            for _ in range(0 if structural else rng.integers(1, 3)):
                unit = (0, 512, 1, 1)[rng.integers(4)]
                data = damage(data, other, rng, unit=unit) if unit else set_header(data, rng)
            path.write_bytes(data)
            try:
                config = configs[0 if structural else number % len(configs)]
                batches = read_tar(path, config, number)
                stats = total(batches)
                if structural:
                    check_pairs(batches)
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}: {[name for name, _ in members]}")
                raise
            kept, read = kept + stats.images, read + stats.samples_read
    assert read / 10 < kept < read * 9 / 10, "some damage is noticed and some is not"


def check_pairs(batches: list[PackedBatch]) -> None:
    """Whatever members were moved, repeated or left out, an image has its own caption."""
    for batch in batches:
        found = unpack(batch)
        for key, text in zip(batch.keys, batch.texts or ("",) * batch.num_images, strict=True):
            name = key.partition("/")[2] + "."
            assert text in ("", caption_of(name).decode("utf-8", "replace").strip())
            expected = naive_patches(noise(P, P, sum(caption_of(name))), found[key].positions, P)
            assert torch.equal(found[key].patches, expected)


def test_a_damaged_tar_gives_samples_or_counted_skips_and_merges_none(tmp_path: Path) -> None:
    check_tars(100, 3, tmp_path)


@pytest.mark.slow
def test_a_thousand_damaged_tars_give_samples_or_counted_skips(tmp_path: Path) -> None:
    check_tars(1_000, 4, tmp_path)
