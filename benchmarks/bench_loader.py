"""The whole loader, shards to batches: two workers, where the time goes, memory over many passes.

The consumer does nothing, so that only the loader is measured. Two `DataLoader` workers are held
against two processes that know nothing of each other: on two cores, both sides decode in two
processes.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from benchmarks.bench_image_path import generated, jpegs
from benchmarks.harness import paired_ratio
from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop
from packer.shards import write_shards
from packer.stream import PackedStream

WORKERS = 2
_CONFIG = PackerConfig(patch_size=16, seq_len=1024, max_tokens=256, token_drop=BetaDrop(0.25, 0.4))
_NUM_SHARDS = 4
_PATIENCE_SECONDS = 600


def run(quick: bool = False, photos: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Measure throughput, the share of each step, and resident memory.

    Args:
        quick: A few images and batches, to see that it runs.
        photos: Tars or folders whose JPEGs are used; none generates photo-like ones of
            640 x 480 pixels.

    Returns:
        One row each for throughput, time and memory; memory only where /proc tells it.
    """
    count, size = (8, (160, 120)) if quick else (100, (640, 480))
    images = list(islice(jpegs(photos), count)) if photos else generated(count, size)
    sequences = 1 if quick else 8
    with tempfile.TemporaryDirectory() as folder:
        shards = _write(images, Path(folder), samples=len(images) * (2 if quick else 8))
        stream = partial(PackedStream, shards, _CONFIG, sequences_per_batch=sequences)
        rows = [
            _throughput(stream, {"plain_loops": 0}, batches=2, pairs=2)
            if quick
            else _throughput(stream, {"plain_loops": 0, "one_worker_loaders": 1}, 40, 8),
            _time(stream, batches=4 if quick else 40, repeats=1 if quick else 5),
        ]
        if Path("/proc/self/statm").exists():
            images_a_pass = len(images) * (2 if quick else 8)
            rows.append(_memory(stream, images_a_pass, passes=4 if quick else 20))
    return [{"images": len(images), "sequences_per_batch": sequences, **row} for row in rows]


def _write(images: Sequence[bytes], folder: Path, samples: int) -> list[str]:
    content = (
        {"key": f"{number:06}", "image": images[number % len(images)], "caption": "a photograph"}
        for number in range(samples)
    )
    return write_shards(content, folder, samples_per_shard=-(-samples // _NUM_SHARDS))


# Two workers against two processes


def _throughput(
    stream: Callable[..., PackedStream], rivals: dict[str, int], batches: int, pairs: int
) -> dict[str, Any]:
    """Compare images/s: all numbers are seconds per image, the workers' start not included.

    Args:
        stream: Makes the stream.
        rivals: Names of what runs in two processes, and its number of workers there.
        batches: Batches a process gives while it is measured.
        pairs: Ratios taken.
    """
    two_workers = partial(_loader_seconds, stream, WORKERS, WORKERS * batches)
    row: dict[str, Any] = {"measured": f"{WORKERS} workers / {WORKERS} processes"}
    for name, workers in rivals.items():
        apart = partial(_apart_seconds, stream, workers, batches)
        row[f"throughput_to_{name}"] = ratio = paired_ratio(
            apart, two_workers, pairs=pairs, warmup=0, self_timed=True
        )
        print(
            f"images/s of {WORKERS} workers / {WORKERS} {name.replace('_', ' ')}: {ratio}; "
            f"{1 / ratio.seconds_b:.0f} images/s",
            flush=True,
        )
    return row


def _loader_seconds(stream: Callable[..., PackedStream], workers: int, batches: int) -> float:
    """Return seconds per image of one loader once all its workers deliver."""
    loader = DataLoader(stream(), batch_size=None, num_workers=workers)
    iterator = iter(loader)
    # What was prefetched while the first batches were made is not part of the rate.
    for _ in islice(iterator, max(2 * workers, 1)):
        pass
    return _seconds_per_image(iterator, batches)


def _seconds_per_image(iterator: Iterator[PackedBatch], batches: int) -> float:
    start = perf_counter()
    images = sum(batch.num_images for batch in islice(iterator, batches))
    return (perf_counter() - start) / images


def _apart_seconds(stream: Callable[..., PackedStream], workers: int, batches: int) -> float:
    """Return seconds per image of two processes together, each with its half of the shards."""
    context = multiprocessing.get_context()
    start_line = context.Barrier(WORKERS)
    ends = [context.Pipe(duplex=False) for _ in range(WORKERS)]
    processes = [
        context.Process(
            target=_run_half, args=(stream, workers, batches, number, start_line, end[1])
        )
        for number, end in enumerate(ends)
    ]
    for process in processes:
        process.start()
    if not all(end[0].poll(_PATIENCE_SECONDS) for end in ends):
        raise RuntimeError(f"both processes must finish within {_PATIENCE_SECONDS} s; one has not.")
    seconds: list[float] = [end[0].recv() for end in ends]
    for process in processes:
        process.join()
    return 1 / sum(1 / value for value in seconds)


def _run_half(
    stream: Callable[..., PackedStream],
    workers: int,
    batches: int,
    number: int,
    start_line: Any,
    result: Any,
) -> None:
    torch.set_num_threads(1)
    one = stream(rank=number, world_size=WORKERS)
    iterator = iter(DataLoader(one, batch_size=None, num_workers=workers))
    for _ in islice(iterator, max(2 * workers, 1)):
        pass
    start_line.wait(_PATIENCE_SECONDS)
    result.send(_seconds_per_image(iterator, batches))


# Where the time goes


def _time(stream: Callable[..., PackedStream], batches: int, repeats: int) -> dict[str, Any]:
    """Split one process's time into steps, by wrapping the functions of `packer.pack`."""
    shares: list[dict[str, float]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            iterator = iter(stream())
            for _ in islice(iterator, 2):  # the window of waiting images fills
                pass
            with _clocks() as seconds:
                start = perf_counter()
                for _ in islice(iterator, batches):
                    pass
                total = perf_counter() - start
            shares.append({name: value / total for name, value in seconds.items()})
    finally:
        torch.set_num_threads(threads)
    row: dict[str, Any] = {"measured": "time, one process"}
    for name in shares[0]:
        row[f"{name}_share"] = float(np.median([share[name] for share in shares]))
    row["rest_share"] = 1 - sum(row[f"{name}_share"] for name in shares[0])
    row["plan_assemble_share"] = row["plan_share"] + row["place_share"] + row["assemble_share"]
    print(
        "share of the time: "
        + ", ".join(
            f"{name.removesuffix('_share')} {value:.4f}"
            for name, value in row.items()
            if name.endswith("_share")
        )
    )
    return row


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Time every call of the loader's steps while inside; they call none of one another."""
    seconds: dict[str, float] = {}
    engine = import_module("packer.pack")  # the package's `pack` is the function
    with ExitStack() as stack:
        for name, owner, attribute in (
            ("pixels", engine, "image_patches"),
            ("header", engine, "read_size"),
            ("plan", engine, "plan_image"),
            ("place", engine.Placer, "push"),
            ("assemble", engine, "assemble"),
        ):
            seconds[name] = 0.0
            timed = _clocked(seconds, name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        yield seconds


def _clocked(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += perf_counter() - start

    return timed


# Memory


def _memory(stream: Callable[..., PackedStream], images_a_pass: int, passes: int) -> dict[str, Any]:
    """Follow the memory of the consumer and its workers over many passes."""
    iterator = iter(DataLoader(stream(), batch_size=None, num_workers=WORKERS))
    taken: list[npt.NDArray[np.float64]] = []
    images = 0
    while len(taken) < passes:
        images += next(iterator).num_images
        if images >= (len(taken) + 1) * images_a_pass:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            taken.append(np.sum([_megabytes(pid) for pid in pids if pid is not None], axis=0))
    row: dict[str, Any] = {"measured": f"memory, {WORKERS} workers", "passes": passes}
    row["images_a_pass"] = images_a_pass
    print(f"memory of consumer and {WORKERS} workers, {passes} passes of {images_a_pass} images:")
    # Resident memory holds the batches under way too, in memory shared by two processes.
    for kind, column in zip(("resident", "private"), np.array(taken).T, strict=True):
        settled = column[min(3, passes - 2) :]
        slope, spread = float(np.polyfit(range(len(settled)), settled, 1)[0]), np.ptp(settled)
        row[f"{kind}_megabytes"] = [round(float(value), 1) for value in column]
        row[f"{kind}_slope_megabytes_a_pass"] = slope
        row[f"{kind}_range_megabytes"] = float(spread)
        print(
            f"  {kind}: {column[0]:.0f} MB after the first, {column[-1]:.0f} MB after the last; "
            f"after the third {slope:+.2f} MB a pass, largest - smallest {spread:.1f} MB"
        )
    return row


def _megabytes(pid: int) -> tuple[float, float]:
    """Return a process's resident memory and the part of it that is not shared, in MB."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    page = os.sysconf("SC_PAGE_SIZE") / 1e6
    return resident * page, (resident - shared) * page
