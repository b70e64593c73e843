"""Keyed randomness: every draw about an image comes from (seed, epoch, sample key) alone.

The same image therefore gets the same resolution, crop, drop rate, kept tokens, augmentation and
caption whatever worker, rank or batch it arrives in.
"""

import struct
from collections.abc import Iterable
from hashlib import blake2b
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_UNPACK = struct.Struct("<8Q").unpack
_STANDARD_NORMAL = NormalDist()


class KeyedDraws(NamedTuple):
    """Eight independent 64-bit integers, one per decision, so that adding one shifts no other."""

    resolution: int
    crop: int
    drop_rate: int
    kept: int
    augment: int
    caption: int
    patch_size: int
    spare: int


def keyed_draws(seed: int, epoch: int, key: str) -> KeyedDraws:
    """Draw the integers of one image in one epoch.

    Args:
        seed: The configuration's seed.
        epoch: Passes over the data completed before this one.
        key: The sample's key.

    Returns:
        Independent uniform integers in [0, 2**64).
    """
    return KeyedDraws._make(_UNPACK(_digest(seed, epoch, key)))


def keyed_draws_many(seed: int, epoch: int, keys: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Draw the integers of many images: `keyed_draws` of each key, some 4 times as fast.

    Returns:
        uint64 (n, 8), columns in the order of `KeyedDraws`.
    """
    digests = b"".join([_digest(seed, epoch, key) for key in keys])
    return np.frombuffer(digests, "<u8").reshape(-1, len(KeyedDraws._fields))


def _digest(seed: int, epoch: int, key: str) -> bytes:
    name = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogatepass")
    return blake2b(name, digest_size=64).digest()


def uniform(draw: int) -> float:
    """Map a 64-bit draw to a float in [0, 1) with 53 random bits."""
    return (draw >> 11) * 2.0**-53


def truncated_normal(draw: int, mean: float, std: float, low: float, high: float) -> float:
    """Map a 64-bit draw to a normal(mean, std) variate truncated to [low, high], by inverse CDF."""
    below = _STANDARD_NORMAL.cdf((low - mean) / std)
    above = _STANDARD_NORMAL.cdf((high - mean) / std)
    quantile = min(max(below + uniform(draw) * (above - below), 1e-300), 1 - 2**-53)
    return min(max(mean + std * _STANDARD_NORMAL.inv_cdf(quantile), low), high)
