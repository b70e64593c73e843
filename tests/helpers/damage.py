"""Damaged and hostile files: headers written by hand, and seeded mutations of bytes."""

import struct
import zlib

import numpy as np


def gif(screen: tuple[int, int], frame: tuple[int, int], disposal: int = 0) -> bytes:
    """Write a GIF of one frame; sizes are (width, height) as the header states them."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + b"\0\0\0\xff\xff\xff"
        + bytes([0x21, 0xF9, 4, disposal << 2, 0, 0, 0, 0])
        + b","
        + struct.pack("<HHHHB", 0, 0, *frame, 0)
        + b"\x02\x02D\x01\0;"
    )


def tiled_tiff(side: int, tile_side: int, tile: bytes) -> bytes:
    """Write a grey TIFF of side x side pixels in one deflated tile of tile_side x tile_side."""
    at = 200
    tags = [
        (256, 3, 1, side),
        (257, 3, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 8),  # deflate
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 4, 1, tile_side),
        (323, 4, 1, tile_side),
        (324, 4, 1, at),
        (325, 4, 1, len(tile)),
    ]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)
    return head.ljust(at, b"\0") + tile


def png_that_claims(width: int, height: int) -> bytes:
    """Write a PNG whose header states a size its pixels do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99)))


_EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1")


def _position(rng: np.random.Generator, data: bytes) -> int:
    """Draw a position; every other one among the first 128 bytes, where headers are."""
    end = min(len(data), 128) if rng.integers(2) else len(data)
    return int(rng.integers(end + 1))


def _block(rng: np.random.Generator, data: bytes, unit: int) -> tuple[int, int]:
    """Draw the bounds of a block whose ends are multiples of ``unit``."""
    count = -(-len(data) // unit)
    first = int(rng.integers(count + 1))
    last = min(first + 1 + int(rng.exponential(1 + count / 8)), count)
    return first * unit, last * unit


def damage(data: bytes, other: bytes, rng: np.random.Generator, *, unit: int = 1) -> bytes:
    """Change a file in one random way.

    Args:
        data: The file.
        other: Another one, for splices.
        rng: Draws the way and the place.
        unit: Blocks that are removed, repeated, swapped or put in are of whole units of bytes.

    Returns:
        The file with some bits flipped; cut; a block removed, repeated, overwritten, exchanged with
        another or put in; a field of 1 to 4 bytes set to an extreme; or its end that of ``other``.
    """
    at = _position(rng, data)
    start, stop = _block(rng, data, unit)
    way = rng.integers(9)
    if way == 0:
        changed = bytearray(data)
        for bit in rng.integers(0, 8 * len(data), rng.integers(1, 9)) if data else ():
            changed[bit // 8] ^= 1 << int(bit % 8)
        return bytes(changed)
    if way == 1:
        return data[:at]
    if way == 2:
        return data[:start] + data[stop:]
    if way == 3:
        return data[:stop] + data[start:]
    if way == 4:
        return data[:start] + rng.bytes(stop - start) + data[stop:]
    if way == 5:
        begin, end = _block(rng, data[stop:], unit)
        begin, end = stop + begin, stop + end
        return data[:start] + data[begin:end] + data[stop:begin] + data[start:stop] + data[end:]
    if way == 6:
        return data[:start] + rng.bytes(unit * int(rng.integers(1, 9))) + data[start:]
    if way == 7:
        field = rng.choice(np.array(_EXTREMES, dtype=object))[: int(rng.integers(1, 5))]
        field = field[::-1] if rng.integers(2) else field
        return data[:at] + field + data[at + len(field) :]
    return data[:start] + other[min(start, len(other)) :]
