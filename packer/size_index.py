"""The size index: a file beside a shard with the sizes its images' headers state.

With it an epoch is planned without opening an image. It is valid only while the shard's length and
modification time are those it was made from; anything else about it that is not as written makes
it be ignored and made again, so it can be deleted, cut or overwritten without changing a plan.
"""

import json
import logging
import os
from binascii import crc32
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from packer.config import PackerConfig
from packer.decode import ImageInfo, read_size
from packer.errors import SkipSample
from packer.plan.types import ImageSize
from packer.shards import Problem, RawSample, image_extension, iter_groups
from packer.source import ShardReader, is_remote
from packer.tar import Member

SUFFIX = ".sizes"
"""What is added to a shard's path."""
MAX_PIXELS = PackerConfig.max_pixels
"""Largest image whose size is stored; of a larger one, that it is (`too_many_pixels`)."""

_FORMAT = "packer size index 1"
_HEADER_BYTES = 1 << 16  # enough for most headers; an image it is not enough for is read whole
# Formats whose header Pillow reads from the first byte on, so that a part of a file says the same.
_FRONT_HEADERS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")
_logger = logging.getLogger("packer")
_unwritable: set[Path] = set()

Header = ImageInfo | SkipSample
"""What the header of a sample's image states, or why it cannot be read."""


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in its order, and what the headers of their images state."""

    shard_size: int
    """Bytes of the shard."""
    shard_mtime_ns: int
    """Modification time of the shard, in nanoseconds."""
    offsets: tuple[int, ...]
    """Byte offset of each sample's first header."""
    keys: tuple[str, ...]
    """Member key of each sample, without the shard's name."""
    infos: tuple[ImageInfo | None, ...]
    """Size in pixels after EXIF orientation, and the orientation; None where it is not known."""
    causes: Mapping[int, str] = field(default_factory=dict)
    """Why it is not known, by the sample's place: ``"decode_error"`` (no header that can be read),
    ``"missing_image"``, or ``"too_many_pixels"`` (more than `MAX_PIXELS`)."""

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        """int32 (n, 2): height and width in pixels of the n images whose size is known."""
        known = [info.size for info in self.infos if info is not None]
        return np.array(known, np.int32).reshape(len(known), 2)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples whose size is not known, by cause."""
        return dict(Counter(self.causes.values()))


def index_path(shard: str | Path) -> Path:
    """Return where the index of a local shard is stored."""
    return Path(f"{shard}{SUFFIX}")


def index_shard(shard: str | Path, *, on_problem: Problem | None = None) -> ShardIndex:
    """Read the size of every image of a shard from its header; no pixel is decoded.

    Args:
        shard: The shard. Of a local file little more than the headers is read; a URL or command,
            which has neither length nor time (0), is read to its end.
        on_problem: As for `packer.shards.iter_shard`; a shard that cannot be read is empty.
    """
    size, mtime_ns = (0, 0) if is_remote(str(shard)) else _identity(shard) or (0, 0)
    recorder = _Recorder()
    groups = iter_groups(shard, on_problem=on_problem or _ignore, most=_HEADER_BYTES)
    for group, reader in groups:
        extension = image_extension(group.members)
        member = None if extension is None else group.members[extension]
        recorder.add(group.offset, group.key, _member_header(member, reader))
    return recorder.index(size, mtime_ns)


def read_index(shard: str | Path) -> ShardIndex | None:
    """Read the index of a shard; None where there is none that is whole and of this very shard."""
    identity = None if is_remote(str(shard)) else _identity(shard)
    if identity is None:
        return None
    try:
        content = index_path(shard).read_bytes()
        start, _, body = content.partition(b"\n")
        header = json.loads(start)
        stated = header["shard_size"], header["shard_mtime_ns"]
        if header["format"] != _FORMAT or stated != identity or header["crc32"] != crc32(body):
            return None
        return _decode(body, *identity)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_index(shard: str | Path, index: ShardIndex) -> bool:
    """Store an index beside its shard, whole or not at all.

    Returns:
        Whether it is stored. It is not if the shard is no local file or has changed since, or if
        the folder cannot be written to, which is logged once.
    """
    stated = index.shard_size, index.shard_mtime_ns
    if is_remote(str(shard)) or _identity(shard) != stated:
        return False
    body = _encode(index)
    header = {
        "format": _FORMAT,
        "shard_size": index.shard_size,
        "shard_mtime_ns": index.shard_mtime_ns,
        "crc32": crc32(body),
    }
    target = index_path(shard)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(json.dumps(header).encode() + b"\n" + body)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        if target.parent not in _unwritable:
            _unwritable.add(target.parent)
            _logger.warning("no size index is stored in %s: %s", target.parent, error)
        return False
    return True


class SizeSource:
    """Sizes of one shard's images as a stream comes across them: from the index, or read.

    Args:
        shard: The shard.
        record: Whether the stream is going to read all of it, so that an index can be stored.
    """

    def __init__(self, shard: str, *, record: bool) -> None:
        self._shard = shard
        self._identity = None if is_remote(shard) else _identity(shard)
        index = read_index(shard)
        self._known: dict[int, Header | None] = {}
        if index is not None:
            self._known = {
                offset: _stored_header(info, index.causes.get(at, ""))
                for at, (offset, info) in enumerate(zip(index.offsets, index.infos, strict=True))
            }
        recorded = record and index is None and self._identity is not None
        self._recorder = _Recorder() if recorded else None

    def header(self, raw: RawSample) -> Header | None:
        """Return what the header of a sample's image states; None leaves it to be read."""
        if self._recorder is None:
            return self._known.get(raw.offset)
        extension = image_extension(raw.members)
        header = read_header(None if extension is None else raw.members[extension])
        self._recorder.add(raw.offset, raw.key.partition("/")[2], header)
        return _unless_too_large(header)

    def give_up(self) -> None:
        """Store no index: not all of the shard could be read."""
        self._recorder = None

    def finish(self) -> None:
        """Store the index, if this is the first time that the shard was read to its end."""
        if self._recorder is not None and self._identity is not None:
            write_index(self._shard, self._recorder.index(*self._identity))


def read_header(image: bytes | None) -> Header:
    """Read the size of an encoded image of up to `MAX_PIXELS`; None is a missing image."""
    if image is None:
        return SkipSample("missing_image", "no member with an image's extension")
    try:
        return read_size(image, max_pixels=MAX_PIXELS)
    except SkipSample as error:
        # Without its traceback, which would keep what the decoder had open.
        return SkipSample(error.cause, error.detail)


def _ignore(cause: str, detail: str) -> None:
    pass


def _member_header(member: Member | None, reader: ShardReader) -> Header:
    """Read a header from a member's first bytes, or from all where they do not suffice."""
    if member is None or len(member.data) == member.length:
        return read_header(None if member is None else member.data)
    if member.data.startswith(_FRONT_HEADERS):
        header = read_header(member.data)
        if isinstance(header, ImageInfo):
            return header
    return read_header(reader.read(member.data_offset, member.length))


def _stored_header(info: ImageInfo | None, cause: str) -> Header | None:
    if info is not None:
        return info
    return _unless_too_large(SkipSample(cause, "as its shard's size index says"))


def _unless_too_large(header: Header) -> Header | None:
    """Leave an image beyond `MAX_PIXELS` to the configuration, which may allow more."""
    too_large = isinstance(header, SkipSample) and header.cause == "too_many_pixels"
    return None if too_large else header


class _Recorder:
    """Collects the samples of a shard."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.keys: list[str] = []
        self.infos: list[ImageInfo | None] = []
        self.causes: dict[int, str] = {}

    def add(self, offset: int, key: str, header: Header) -> None:
        if isinstance(header, SkipSample):
            self.causes[len(self.offsets)] = header.cause
        self.infos.append(None if isinstance(header, SkipSample) else header)
        self.offsets.append(offset)
        self.keys.append(key)

    def index(self, shard_size: int, shard_mtime_ns: int) -> ShardIndex:
        return ShardIndex(
            shard_size,
            shard_mtime_ns,
            tuple(self.offsets),
            tuple(self.keys),
            tuple(self.infos),
            self.causes,
        )


def _identity(shard: str | Path) -> tuple[int, int] | None:
    """Return the size and modification time of a shard; None where it cannot be asked."""
    try:
        stat = os.stat(shard)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _encode(index: ShardIndex) -> bytes:
    """List the samples: [offset, height, width, orientation, key] or [offset, cause, key]."""
    rows = [
        [offset, index.causes[at], key] if info is None else [offset, *info.size, info[1], key]
        for at, (offset, key, info) in enumerate(
            zip(index.offsets, index.keys, index.infos, strict=True)
        )
    ]
    lines = ",\n".join(map(json.dumps, rows))
    return f"[{lines}]\n".encode("ascii")


def _decode(body: bytes, shard_size: int, shard_mtime_ns: int) -> ShardIndex:
    recorder = _Recorder()
    for offset, *header, key in json.loads(body):
        if len(header) == 1:
            recorder.add(offset, key, SkipSample(header[0]))
        else:
            height, width, orientation = header
            recorder.add(offset, key, ImageInfo(ImageSize(height, width), orientation))
    return recorder.index(shard_size, shard_mtime_ns)
