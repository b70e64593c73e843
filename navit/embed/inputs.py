"""Folders, lists of paths and tar shards -> chunks of images, in an order that never changes."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from navit.embed.parts import Chunk, Item
from packer.errors import NOTED_CAUSES, SkipSample
from packer.shards import (
    IMAGE_EXTENSIONS,
    RawSample,
    expand_shards,
    image_extension,
    iter_groups,
    iter_shard,
    read_samples_at,
)
from packer.source import is_remote, shard_name, shown

Problems = tuple[tuple[str, str], ...]
"""Cause and detail of what a shard has lost."""

_AT_A_TIME = 32  # samples of a shard held in memory together


@dataclass(frozen=True)
class FileChunk:
    """Image files, by path."""

    names: str
    """The paths, joined by NUL: one object for thousands, which processes can share."""

    def read(self) -> Iterator[Item]:
        """Yield the paths under themselves as keys; files are read where they are decoded."""
        for name in self.names.split("\0"):
            yield _item(name, Path(name))

    def describe(self) -> str:
        """Say what the chunk is, for the fingerprint of the inputs."""
        return self.names


@dataclass(frozen=True)
class ShardChunk:
    """Samples of a local shard, by byte offset."""

    shard: str
    """Path of the shard."""
    offsets: npt.NDArray[np.int64]
    """int64 (n,) where the samples start."""
    problems: Problems = ()
    """What the shard has lost, told after its last sample."""

    def read(self) -> Iterator[Item]:
        """Yield the samples' images under ``<shard name>/<member key>``."""
        for start in range(0, len(self.offsets), _AT_A_TIME):
            offsets = self.offsets[start : start + _AT_A_TIME].tolist()
            samples = read_samples_at(self.shard, offsets)
            yield from (_from_shard(samples[offset]) for offset in offsets)
        yield from _lost(self.shard, self.problems)

    def describe(self) -> str:
        """Say what the chunk is, for the fingerprint of the inputs."""
        return f"{shard_name(self.shard)} {self.offsets.tolist()} {self.problems}"


@dataclass(frozen=True)
class StreamChunk:
    """A whole shard behind a URL or a command, which can only be read from its start."""

    shard: str
    """URL or command."""

    def read(self) -> Iterator[Item]:
        """Yield the samples' images under ``<shard name>/<member key>``."""
        problems: list[tuple[str, str]] = []
        for raw in iter_shard(self.shard, on_problem=_collect(problems)):
            yield _from_shard(raw)
        yield from _lost(self.shard, tuple(problems))

    def describe(self) -> str:
        """Say what the chunk is, for the fingerprint of the inputs."""
        return self.shard


@dataclass(frozen=True)
class Inputs:
    """All images of a run."""

    chunks: tuple[Chunk, ...]
    """The images in order, in chunks that are packed and stored apart."""
    count: int | None
    """Number of images; None where a URL or command does not say."""
    fingerprint: str
    """SHA-256 of names and places: equal for equal inputs."""
    ignored: int = 0
    """Files of the folders that are no images by their extension."""


@dataclass
class _Collected:
    size: int
    names: list[str] = field(default_factory=list)
    chunks: list[FileChunk | ShardChunk | StreamChunk] = field(default_factory=list)
    count: int | None = 0
    ignored: int = 0

    def add_files(self, names: Sequence[str]) -> None:
        self.names += names
        self._count(len(names))

    def end_files(self) -> None:
        """Cut the files collected into chunks; those of neighbouring inputs share them."""
        for start in range(0, len(self.names), self.size):
            self.chunks.append(FileChunk("\0".join(self.names[start : start + self.size])))
        self.names = []

    def add_shard(self, shard: str) -> None:
        self.end_files()
        if is_remote(shard):
            self.chunks.append(StreamChunk(shard))
            self.count = None
            return
        offsets, problems = _index(shard)
        starts = range(0, max(len(offsets), 1), self.size)
        for start in starts:
            lost = problems if start == starts[-1] else ()
            self.chunks.append(ShardChunk(shard, offsets[start : start + self.size], lost))
        self._count(len(offsets))

    def _count(self, more: int) -> None:
        if self.count is not None:
            self.count += more


def find_inputs(
    given: Sequence[str], *, chunk_size: int, on_shard: Callable[[str], None] | None = None
) -> Inputs:
    """List the images that inputs name.

    Args:
        given: Each one of these. A folder: to its depth the files with an image's extension,
            sorted; names that begin with a dot and links to folders are passed over; a folder with
            ``.tar`` files names these instead. An image file. Tar shards: a path, a brace range, a
            glob pattern, a URL or a ``pipe:`` command. Any other file: a list with one path a line,
            relative ones to the current folder.
        chunk_size: Images of a chunk.
        on_shard: Called with each local shard before its headers are read, for progress.

    Raises:
        ValueError: If an input does not exist or names no image.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
    found = _Collected(chunk_size)
    shards: list[str] = []
    for name in given:
        named = _add(found, name)
        for shard in named:
            if on_shard is not None:
                on_shard(shard)
            found.add_shard(shard)
        shards += named
    _check_names(shards)
    found.end_files()
    if not found.chunks:
        raise ValueError(f"the inputs must name at least one image; {', '.join(given)} name none.")
    digest = hashlib.sha256()
    for chunk in found.chunks:
        digest.update(chunk.describe().encode("utf-8", "surrogateescape") + b"\n")
    return Inputs(tuple(found.chunks), found.count, digest.hexdigest(), found.ignored)


def _add(found: _Collected, name: str) -> list[str]:
    """Add the files an input names; return the shards it names."""
    path = Path(name)
    if is_remote(name) or ".tar" in path.name:
        return expand_shards(name)
    if not path.exists():
        raise FileNotFoundError(
            f"an input must be a folder, an image, a list of paths or tar shards; {name} does not "
            "exist."
        )
    if path.is_dir():
        images, tars, others = _walk(name)
        if images and tars:
            raise ValueError(
                f"a folder must hold image files or tar shards; {name} has {len(images)} and "
                f"{len(tars)}. Name the shards as '{name}/*.tar', and the folders of images."
            )
        if not images and not tars:
            raise ValueError(
                f"a folder must hold images ({', '.join(IMAGE_EXTENSIONS)}) or tar shards; {name} "
                f"has none among {others} files."
            )
        found.add_files(images)
        found.ignored += others
        return tars
    found.add_files([name] if _is_image(name) else _read_list(path))
    return []


def _check_names(shards: Sequence[str]) -> None:
    by_name: dict[str, str] = {}
    for shard in shards:
        name = shard_name(shard)
        if name in by_name:
            raise ValueError(
                f"shards must have different file names, which begin the keys; got "
                f"{shown(by_name[name])} and {shown(shard)}. Embed them apart, or rename one."
            )
        by_name[name] = shard


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _walk(folder: str) -> tuple[list[str], list[str], int]:
    """Return the image files and the shards below a folder, sorted, and the number of others."""
    images: list[str] = []
    tars: list[str] = []
    others = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):  # such as the ._ files of macOS, which are no images
                continue
            if _is_image(name):
                images.append(os.path.join(place, name))
            elif name.endswith(".tar"):
                tars.append(os.path.join(place, name))
            else:
                others += 1
    return sorted(images), sorted(tars), others


def _read_list(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"an input must be a folder, an image ({', '.join(IMAGE_EXTENSIONS)}), a tar shard or "
            f"a text file of paths; {path} is none of them."
        ) from error
    names = [line.rstrip("\r") for line in text.split("\n")]
    names = [name for name in names if name.strip()]
    if not names or any("\0" in name for name in names):
        raise ValueError(f"a list of images must hold one path a line; {path} holds none.")
    return names


def _index(shard: str) -> tuple[npt.NDArray[np.int64], Problems]:
    """Read the headers of a local shard: where its samples start, and what it has lost."""
    problems: list[tuple[str, str]] = []
    offsets = [
        group.offset for group, _ in iter_groups(shard, on_problem=_collect(problems), most=0)
    ]
    return np.array(offsets, dtype=np.int64), tuple(problems)


def _collect(problems: list[tuple[str, str]]) -> Callable[[str, str], None]:
    def on_problem(cause: str, detail: str) -> None:
        if cause not in NOTED_CAUSES:
            problems.append((cause, detail))

    return on_problem


def _lost(shard: str, problems: Problems) -> Iterator[Item]:
    for cause, detail in problems:
        yield Item(shown(shard), SkipSample(cause, detail))


def _from_shard(raw: RawSample) -> Item:
    extension = image_extension(raw.members)
    if extension is None:
        return _item(raw.key, SkipSample("missing_image", f"members: {', '.join(raw.members)}"))
    return _item(raw.key, raw.members[extension])


def _item(key: str, image: object) -> Item:
    if "\n" in key or "\r" in key:
        return Item(key, SkipSample("bad_key", "a key must be one line: the keys are written so"))
    return Item(key, image)
