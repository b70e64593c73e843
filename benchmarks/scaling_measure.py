"""What `benchmarks.scaling` needs from this machine: small measurements, and stored results.

Times are processor time of this process, so that a busy machine changes them little; files are in
the page cache, so that a disk's own time is not in them.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.bench_image_path import generated, jpegs
from benchmarks.scaling_formulas import loss_flops, stream_config
from navit.loss import contrastive_loss
from packer.config import PackerConfig
from packer.plan.deal import stream_shards
from packer.shards import write_shards
from packer.stream import LoaderState, PackedStream

RESULTS = Path(__file__).parent / "results"
SHUFFLE_WINDOW = 1024
"""Samples among which a stream draws its next one: the trainer's default."""


@dataclass(frozen=True)
class Measured:
    """Figures of this machine: one thread each, seconds and bytes."""

    milliseconds_per_image: float
    """Encoded photograph to kept patches, the loader's own share included."""
    lengths_per_second: float
    """Images planned and placed for many streams."""
    bytes_per_pair: float
    """A pair in its shard: image, caption, tar headers."""
    bytes_source: str
    """Whose bytes these are."""
    state_bytes: float
    """JSON of one stream's state, with the digits of a data set of the run's size."""
    waiting_pairs: int
    """Pairs a stream's state names: a restart reads them again."""
    first_batch_fresh: float
    """Seconds to a stream's first batch at the start of a run."""
    first_batch_resumed: float
    """Seconds to a stream's first batch from a stored state."""
    open_seconds_per_shard: float
    """Listing a shard and asking for its size when a stream is made."""
    order_seconds_per_shard: float
    """Ordering the shards of an epoch, as every stream does for itself."""
    bytes_per_shard_name: float
    """Memory of a shard's path in the list that every process holds."""
    loss_flops_per_second: float
    """Of the tiled loss, forward and backward."""


def measure(
    photos: Sequence[Path] = (), *, num_shards: int, shard_bytes: int, quick: bool = False
) -> Measured:
    """Measure in about a minute on one thread.

    Args:
        photos: Tars or folders whose JPEGs are the pairs' images; none: drawn ones.
        num_shards: Shards of the planned run, for the digits of the states.
        shard_bytes: Bytes of one of its shards, for the same.
        quick: Tiny inputs, to see that it runs; the numbers mean nothing.
    """
    given = list(islice(jpegs(photos), 8 if quick else 400)) if photos else []
    images = given or generated(4 if quick else 50, (96, 64) if quick else (640, 480))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs, fresh, resumed, state = _restart(images, 40 if quick else 2 * SHUFFLE_WINDOW, quick)
        loss = _loss_rate(128 if quick else 2048, repeats=1 if quick else 3)
        opened, ordered, named = _shard_costs(20 if quick else 2000)
    finally:
        torch.set_num_threads(threads)
    whole = _with_digits(state, num_shards, shard_bytes)
    return Measured(
        milliseconds_per_image=_stored_milliseconds(),
        lengths_per_second=_stored_planning(),
        bytes_per_pair=pairs,
        bytes_source=", ".join(map(str, photos)) if given else "drawn JPEGs of 640 x 480",
        state_bytes=float(len(json.dumps(whole))),
        waiting_pairs=sum(1 for _ in _rows(state)),
        first_batch_fresh=fresh,
        first_batch_resumed=resumed,
        open_seconds_per_shard=opened,
        order_seconds_per_shard=ordered,
        bytes_per_shard_name=named,
        loss_flops_per_second=loss,
    )


def newest(theme: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the rows of the newest stored result of a benchmark.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(folder.glob(f"*_{theme}.json"))
    if not found:
        raise FileNotFoundError(
            f"a stored result of the benchmark {theme} must be in {folder}; there is none. Run "
            f"python -m benchmarks {theme}."
        )
    rows: list[dict[str, Any]] = json.loads(found[-1].read_text())["rows"]
    return rows


def _stored_milliseconds() -> float:
    """Bytes to patches at 256 tokens, over the pixels' share of a loader's time."""
    photographs = [
        row["ours_ms"]
        for row in newest("image_path")
        if row["max_tokens"] == 256 and row["kind"] != "figures"
    ]
    share = next(row["pixels_share"] for row in newest("loader") if "pixels_share" in row)
    return float(photographs[0] / share)


def _stored_planning() -> float:
    rows = newest("scale")
    return float(next(r["lengths_per_second"] for r in rows if r["phase"] == "never stopped"))


def _restart(
    images: Sequence[bytes], samples: int, quick: bool
) -> tuple[float, float, float, dict[str, Any]]:
    """Return bytes a pair, seconds to a fresh and to a resumed first batch, and a stream's state.

    The state is that after a batch taken once the shuffle window is full.
    """
    config, window = stream_config(), 8 if quick else SHUFFLE_WINDOW
    with TemporaryDirectory() as folder:
        content = (
            {"key": f"{i:06}", "image": data, "caption": "a photograph of something or other"}
            for i, data in enumerate(islice(cycle(images), samples))
        )
        shards = write_shards(content, folder, samples_per_shard=-(-samples // 4))
        size = sum(Path(shard).stat().st_size for shard in shards) / samples
        fresh, resumed = [], []
        for _ in range(1 if quick else 3):
            seconds, state = _first_batch(shards, config, window, None)
            fresh.append(seconds)
            again, _ = _first_batch(shards, config, window, state)
            resumed.append(again)
    (stream,) = state.streams.values()
    return size, median(fresh), median(resumed), dict(stream)


def _first_batch(
    shards: Sequence[str], config: PackerConfig, window: int, state: LoaderState | None
) -> tuple[float, LoaderState]:
    after = LoaderState() if state is None else LoaderState.from_dict(state.to_dict())
    start = process_time()
    stream = PackedStream(
        shards, config, sequences_per_batch=4, shuffle_window=window, rank=0, world_size=1,
        state=state,
    )  # fmt: skip
    batch = next(iter(stream))
    seconds = process_time() - start
    after.update(batch)
    return seconds, after


def _rows(state: dict[str, Any]) -> Any:
    yield from state["window"]
    yield from state["placer"]
    for sequence in state["ready"]:
        yield from sequence


def _with_digits(state: dict[str, Any], num_shards: int, shard_bytes: int) -> dict[str, Any]:
    """Put shards and offsets of a large data set in the place of those of a small one."""
    rng = random.Random(0)
    large: dict[str, Any] = json.loads(json.dumps(state))
    for row in _rows(large):
        row[1], row[2] = rng.randrange(num_shards), rng.randrange(0, shard_bytes, 512)
    return large


def _loss_rate(count: int, *, dim: int = 512, repeats: int) -> float:
    """Return operations per second of the tiled loss, float32."""
    generator = torch.Generator().manual_seed(0)
    sides = F.normalize(torch.randn(2, count, dim, generator=generator), dim=-1)
    image, text = (side.clone().requires_grad_() for side in sides)
    scale = torch.tensor(20.0, requires_grad=True)

    def step() -> None:
        contrastive_loss(image, text, scale).backward()  # type: ignore[no-untyped-call]

    return loss_flops(count, count, dim) / _least_seconds(step, repeats)


def _least_seconds(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        start = process_time()
        function()
        seconds.append(process_time() - start)
    return max(min(seconds[1:]), 1e-9)


def _shard_costs(count: int) -> tuple[float, float, float]:
    """Return a shard's seconds when a stream is made and an epoch ordered, and its path's bytes."""
    buffer = BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    with TemporaryDirectory() as folder:
        first = Path(write_shards([{"key": "0", "image": buffer.getvalue()}], folder)[0])
        content = first.read_bytes()
        paths = []
        for number in range(count):
            paths.append(Path(folder) / f"shard-{number:07}.tar")
            paths[-1].write_bytes(content)
        start = process_time()
        PackedStream(paths, stream_config(), sequences_per_batch=1, rank=0, world_size=1)
        opened = (process_time() - start) / count
    start = process_time()
    stream_shards(count * 10, 0, 8, seed=0, epoch=0)
    ordered = (process_time() - start) / (count * 10)
    return opened, ordered, sum(sys.getsizeof(str(path)) + 8 for path in paths) / count
