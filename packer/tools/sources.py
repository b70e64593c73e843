"""Where the tools take images from: size lists and shards, read by several processes."""

import csv
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
import tyro
from tqdm import tqdm

T = TypeVar("T")
Shards = tyro.conf.Positional[
    Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SHARDS ...]", help_behavior_hint="")]
]
"""Shards on the command line, without an option's name."""
Int64Array = npt.NDArray[np.int64]

_SWAPS_SIDES = ("5", "6", "7", "8")  # EXIF orientations that turn an image by 90 degrees
_WORTH_PROCESSES = 256 << 20  # bytes of shards from which several processes save time


@dataclass(frozen=True)
class SizeList:
    """Image sizes read from a file."""

    sizes: Int64Array
    """int64 (n, 2) heights and widths in pixels, after EXIF orientation."""
    num_bytes: Int64Array | None
    """int64 (n,) bytes of the encoded images, where the file says so."""


def read_size_list(path: Path) -> SizeList:
    """Read sizes from a table (.tsv, .csv) or an array (.npy).

    Args:
        path: A table with a heading that names ``height`` and ``width`` (pixels) and perhaps
            ``exif_orientation`` (1 to 8, applied) and ``bytes``; or an integer array (n, 2) of
            heights and widths.

    Raises:
        ValueError: If the file cannot be read as one of these, or a side is not positive.
    """
    try:
        if path.suffix == ".npy":
            found = SizeList(_from_array(np.load(path)), None)
        else:
            with path.open(newline="", encoding="utf-8") as file:
                found = _from_table(csv.DictReader(file, delimiter=_delimiter(path)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a size list must be a .tsv or .csv with the columns height and width, or a .npy of "
            f"shape (n, 2); {path}: {error}"
        ) from error
    if not len(found.sizes) or found.sizes.min() < 1:
        what = "none" if not len(found.sizes) else f"one of {found.sizes.min()} pixels"
        raise ValueError(f"a size list must hold sides of at least 1 pixel; {path} has {what}.")
    return found


def _delimiter(path: Path) -> str:
    return "," if path.suffix == ".csv" else "\t"


def _from_array(array: npt.NDArray[Any]) -> Int64Array:
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"it holds {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _from_table(rows: "csv.DictReader[str]") -> SizeList:
    names = rows.fieldnames or []
    if not {"height", "width"} <= set(names):
        raise ValueError(f"its columns are {', '.join(names) or 'none'}")
    sizes, num_bytes = [], []
    for row in rows:
        height, width = int(row["height"]), int(row["width"])
        turned = row.get("exif_orientation") in _SWAPS_SIDES
        sizes.append((width, height) if turned else (height, width))
        if "bytes" in names:
            num_bytes.append(int(row["bytes"]))
    return SizeList(
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        np.array(num_bytes, dtype=np.int64) if num_bytes else None,
    )


def map_shards(
    function: Callable[[str], T], shards: Sequence[str], *, workers: int | None, what: str
) -> Iterator[T]:
    """Apply a function to every shard, in order, under a progress bar.

    Args:
        function: What is done to a shard; with several processes it is pickled.
        shards: The shards.
        workers: Processes; None takes all cores where there is much to read, else one.
        what: Heading of the progress bar, which is shown where stderr is a terminal.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}.")
    if workers is None:
        total = sum(os.path.getsize(path) for path in shards if os.path.isfile(path))
        workers = _num_cores() if total >= _WORTH_PROCESSES else 1
    with (
        _mapper(min(workers, len(shards))) as run,
        tqdm(total=len(shards), desc=what, unit="shard", disable=None) as bar,
    ):
        for result in run(function, shards):
            yield result
            bar.update()


@contextmanager
def _mapper(processes: int) -> Iterator[Any]:
    if processes <= 1:
        yield map
        return
    # "spawn" everywhere: a fork of a process that runs threads (torch) may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as executor:
        try:
            yield executor.map
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that read shards ended early; run again with --workers 1 to see why."
            ) from error


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
