"""Writing the demonstration set as webdataset tar shards, the same bytes for the same seed."""

import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from webdataset import TarWriter

from packer.demo.draw import draw_image, encode_jpeg
from packer.demo.scene import Scene, draw_caption, draw_scene
from packer.plan.draws import keyed_draws, truncated_normal
from packer.plan.types import ImageSize

Split = Literal["train", "val"]

VERSION = 1
"""Raised whenever the same settings would give other bytes; part of the marker."""
SHARD_SIZE = 500
"""Pairs per tar shard."""
MARKER = "demo.json"
"""Written last: a folder that has it is complete."""
_SHORT_MEDIAN, _SHORT_RANGE, _LONG_LIMIT = 70.0, (48.0, 300.0), 400.0
_MIN_PARALLEL = 1000
_MAX_REDRAWS = 2000


@dataclass(frozen=True)
class DemoSettings:
    """What determines the bytes of a demonstration set."""

    num_train: int = 4000
    """Training pairs."""
    num_val: int = 500
    """Validation pairs; no caption of theirs fits a second one, no scene occurs in training."""
    scale: float = 1.0
    """Multiplies every length; at 1 sides are 48 to 400 px, the median short side is 89 px."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        for name, least in (("num_train", 1), ("num_val", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
        if not 0.25 <= self.scale <= 20:
            raise ValueError(
                f"scale must be between 0.25 (shapes blur below) and 20; got {self.scale!r}. "
                "1 gives a median short side of about 89 px, 4 of about 356 px."
            )


@dataclass(frozen=True)
class DemoPaths:
    """Where a demonstration set lies."""

    folder: Path
    train: tuple[Path, ...]
    """Training shards in order."""
    val: tuple[Path, ...]
    """Validation shards in order."""


def ensure_demo(
    folder: Path | str,
    *,
    num_train: int = 4000,
    num_val: int = 500,
    scale: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> DemoPaths:
    """Return the demonstration set of a folder, writing it unless it is already complete.

    Args:
        folder: Where the shards and the marker ``demo.json`` lie.
        num_train: Training pairs.
        num_val: Validation pairs.
        scale: Multiplies every length in pixels.
        seed: Seed of every draw.
        progress: Whether a progress bar is shown while writing.

    Returns:
        Paths of the shards.

    Raises:
        ValueError: As `make_demo`.
    """
    settings = DemoSettings(num_train, num_val, scale, seed)
    paths = _paths(Path(folder), settings)
    if _is_complete(paths, settings):
        return paths
    return make_demo(folder, **asdict(settings), progress=progress)


def make_demo(
    folder: Path | str,
    *,
    num_train: int = 4000,
    num_val: int = 500,
    scale: float = 1.0,
    seed: int = 0,
    progress: bool = True,
    processes: int | None = None,
) -> DemoPaths:
    """Draw captioned scenes and write them as webdataset tar shards of 500 pairs.

    Members are ``NNNNNN.jpg``, ``NNNNNN.txt`` (caption) and ``NNNNNN.json`` (key, width, height,
    orig_width, orig_height, set, attributes of the scene). Native sizes follow the web's: short
    side lognormal with the spread of LAION-400M, long / short = exp|N(0, 0.32)|, either way up;
    what a scene shows is drawn separately, so size and shape tell nothing about it.

    Args:
        folder: Created where missing; older shards of a demonstration set in it are replaced.
        num_train: Training pairs.
        num_val: Validation pairs.
        scale: Multiplies every length in pixels.
        seed: Seed of every draw; the bytes do not depend on ``processes``.
        progress: Whether a progress bar is shown.
        processes: Processes that draw; by default one, or all cores from 1,000 pairs on.

    Returns:
        Paths of the shards.

    Raises:
        ValueError: If a setting is out of range, or ``num_val`` exceeds the number of scenes that
            can be told apart.
        RuntimeError: If several processes are to draw and none can be started.
    """
    settings = DemoSettings(num_train, num_val, scale, seed)
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1 or None (choose); got {processes}.")
    paths = _paths(Path(folder), settings)
    # The scenes are planned before anything is deleted: settings that cannot be met change nothing.
    scenes = _plan(settings)
    _clear(paths.folder)
    if processes is None:
        processes = _num_cores() if num_train + num_val >= _MIN_PARALLEL else 1
    jobs = [(settings, split, i, scene) for split, part in scenes.items() for i, scene in part]
    with (
        _mapper(processes) as run,
        tqdm(total=len(jobs), desc="Drawing scenes", unit="image", disable=not progress) as bar,
    ):
        drawn = run(draw_sample, jobs)
        for shard, count in _shards(paths, settings):
            _write_shard(shard, drawn, count, bar)
    marker = {**_stamp(settings), "bytes": {p.name: p.stat().st_size for p in _all(paths)}}
    _write_atomically(paths.folder / MARKER, json.dumps(marker, indent=2).encode())
    return paths


def draw_sample(job: tuple[DemoSettings, Split, int, Scene]) -> dict[str, Any]:
    """Draw one pair from its settings, split, index and scene; runs in any process.

    Returns:
        webdataset sample with ``__key__`` and the bytes of jpg, txt and json.
    """
    settings, split, index, scene = job
    key = f"{index:06d}"
    size = _draw_size(settings, split, index)
    image = draw_image(scene, size)
    fields = {
        "key": key,
        "width": image.width,
        "height": image.height,
        "orig_width": image.width,
        "orig_height": image.height,
        "set": "demo",
        **scene.attributes(),
    }
    caption = draw_caption(scene, _rng(settings, split, index, "caption"))
    return {
        "__key__": key,
        "jpg": encode_jpeg(image),
        "txt": caption.encode(),
        "json": json.dumps(fields).encode(),
    }


def _plan(settings: DemoSettings) -> dict[Split, list[tuple[int, Scene]]]:
    """Choose every scene; validation first, so that training can leave its scenes out."""
    taken: set[tuple[object, ...]] = set()
    val = [(i, _new_scene(settings, i, taken)) for i in range(settings.num_val)]
    held_out = {_content(scene) for _, scene in val}
    train = []
    for i in range(settings.num_train):
        rng = _rng(settings, "train", i, "scene")
        scene = draw_scene(rng)
        while _content(scene) in held_out:
            scene = draw_scene(rng)
        train.append((i, scene))
    return {"train": train, "val": val}


def _new_scene(settings: DemoSettings, index: int, taken: set[tuple[object, ...]]) -> Scene:
    rng = _rng(settings, "val", index, "scene")
    for _ in range(_MAX_REDRAWS):
        scene = draw_scene(rng)
        identities = set(scene.identities())
        if taken.isdisjoint(identities):
            taken |= identities
            return scene
    raise ValueError(
        f"num_val must leave every validation caption unambiguous; got {settings.num_val}, and "
        f"found no further distinct scene after {index}. Lower num_val."
    )


def _content(scene: Scene) -> tuple[object, ...]:
    looks = tuple((*item.look, item.fill) for item in scene.objects)
    return looks, scene.relation, scene.third


def _draw_size(settings: DemoSettings, split: Split, index: int) -> ImageSize:
    """Draw height and width in pixels, distributed like those of LAION-400M but smaller."""
    draws = keyed_draws(settings.seed, 0, f"{split}/{index}/size")
    low, high = _SHORT_RANGE
    # Lognormal(5.564, 0.685) px is the short side on the web; only its median is made smaller.
    short = exp(truncated_normal(draws.resolution, log(_SHORT_MEDIAN), 0.685, log(low), log(high)))
    ratio = exp(abs(truncated_normal(draws.crop, 0.0, 0.32, -1.5, 1.5)))
    long = min(short * ratio, _LONG_LIMIT)
    sides = round(short * settings.scale), round(long * settings.scale)
    return ImageSize(*(sides if draws.patch_size % 2 else sides[::-1]))


def _rng(settings: DemoSettings, split: Split, index: int, purpose: str) -> random.Random:
    return random.Random(f"{settings.seed}/{split}/{index}/{purpose}")


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _mapper(processes: int) -> Iterator[Any]:
    """Give an ordered lazy map over one or several processes."""
    if processes == 1:
        yield map
        return
    # "spawn" everywhere: a fork of a process that runs threads (torch) may hang. An executor and
    # no Pool: where a script without `if __name__ == "__main__"` lets no process start, a Pool
    # starts new ones for ever.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as executor:
        try:
            executor.submit(int).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "drawing in several processes needs a script whose own work stands below "
                '`if __name__ == "__main__":`; the processes could not be started. Move it there, '
                "or pass processes=1."
            ) from error
        yield lambda function, jobs: executor.map(function, jobs, chunksize=32)


def _paths(folder: Path, settings: DemoSettings) -> DemoPaths:
    def shards(split: Split, count: int) -> tuple[Path, ...]:
        return tuple(folder / f"demo-{split}-{i:05d}.tar" for i in range(-(-count // SHARD_SIZE)))

    return DemoPaths(folder, shards("train", settings.num_train), shards("val", settings.num_val))


def _all(paths: DemoPaths) -> tuple[Path, ...]:
    return paths.train + paths.val


def _shards(paths: DemoPaths, settings: DemoSettings) -> Iterator[tuple[Path, int]]:
    for shards, count in ((paths.train, settings.num_train), (paths.val, settings.num_val)):
        for i, shard in enumerate(shards):
            yield shard, min(SHARD_SIZE, count - i * SHARD_SIZE)


def _stamp(settings: DemoSettings) -> dict[str, Any]:
    return {"version": VERSION, **asdict(settings)}


def _is_complete(paths: DemoPaths, settings: DemoSettings) -> bool:
    try:
        marker = json.loads((paths.folder / MARKER).read_bytes())
        sizes = {path.name: path.stat().st_size for path in _all(paths)}
    except (OSError, ValueError):
        return False
    return bool(marker == {**_stamp(settings), "bytes": sizes})


def _clear(folder: Path) -> None:
    """Remove an older set: its marker first, so that no half-written folder looks complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    for split in ("train", "val"):
        for path in (
            *folder.glob(f"demo-{split}-[0-9]*.tar"),
            *folder.glob(f"demo-{split}-*.part"),
        ):
            path.unlink()


def _write_shard(path: Path, samples: Iterator[dict[str, Any]], count: int, bar: Any) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for _ in range(count):
            tar.write(next(samples))
            bar.update()
    part.replace(path)


def _write_atomically(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
