"""Walking a tar from header to header: members with their byte offsets, joined to groups.

Headers are parsed by the standard `tarfile` (11 us each); the walk is ours, because resuming needs
offsets and because `tarfile` ends silently where a shard is cut at a header. The long names of GNU
and POSIX (pax) tars are understood. Offsets only rise, so a stream that cannot seek is walked too.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from packer.source import ShardReader

_BLOCK = 512
_MAX_EXTENSION_HEADER = 1 << 20  # bytes; a name longer than this is a damaged header


class Defect(Exception):
    """The shard cannot be read on. ``name`` is that of the member concerned, where it is known."""

    def __init__(self, cause: str, detail: str, name: str | None = None) -> None:
        super().__init__(cause, detail)
        self.cause, self.detail, self.name = cause, detail, name


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    """Its path."""
    offset: int
    """Byte offset of its first header."""
    data_offset: int
    """Byte offset of its content."""
    length: int
    """Bytes of its content."""
    data: bytes
    """What was read of its content."""


@dataclass(slots=True)
class Group:
    """Neighbouring members whose paths agree up to the last dot."""

    key: str
    offset: int
    members: dict[str, Member] = field(default_factory=dict)
    """By extension, in small letters."""
    repeated: bool = False


def _split_name(name: str) -> tuple[str, str] | None:
    """Split a member's path into key and extension at its last dot; None if it belongs to none."""
    base = name.rpartition("/")[2]
    key, _, extension = name.removeprefix("./").rpartition(".")
    if base.startswith(".") or "." not in base or not extension:
        return None
    return key, extension.lower()


def grouped(members: Iterator[Member]) -> Iterator[Group]:
    """Join neighbouring members of equal key; before a defect, the last group only if whole."""
    group: Group | None = None
    try:
        for member in members:
            parts = _split_name(member.name)
            if parts is None:
                continue
            key, extension = parts
            if group is None or key != group.key:
                if group is not None:
                    yield group
                group = Group(key, member.offset)
            group.repeated |= extension in group.members
            group.members[extension] = member
    except Defect as defect:
        if group is not None and _is_whole(group, defect):
            yield group
        raise
    if group is not None:
        yield group


def _is_whole(group: Group, defect: Defect) -> bool:
    if defect.cause == "unterminated_shard":
        return True
    if defect.name is None:
        return False  # what follows may have been a member of this group
    parts = _split_name(defect.name)
    return parts is None or parts[0] != group.key


def walk(
    reader: ShardReader, offset: int, read_from: int, *, most: int | None = None
) -> Iterator[Member]:
    """Yield regular members from a header at ``offset`` on; those before ``read_from`` unread.

    Args:
        reader: The shard.
        offset: Where a header starts.
        read_from: The content of members that start before is left out.
        most: Bytes of a member's content that are read; None reads all.
    """
    while True:
        start = offset
        header, offset, name = _read_header(reader, offset)
        if header is None:
            return
        is_file = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        if header.issparse() or header.size < 0:
            raise Defect("corrupt_shard", f"{name} at byte {start} is sparse or has no valid size")
        length = header.size if is_file else 0
        data = b""
        if start >= read_from:
            data = reader.read(offset, length if most is None else min(length, most))
        if not reader.reaches(offset + length):
            raise _ended(reader, "truncated_shard", f"the file ends inside {name}", name)
        if is_file:
            yield Member(name, start, offset, length, data)
        offset += _padded(length)


def _read_header(reader: ShardReader, offset: int) -> tuple[tarfile.TarInfo | None, int, str]:
    """Read a header and its extensions: (None at the end mark, offset of the data, name)."""
    changes: dict[str, str] = {}
    while True:
        block = reader.read(offset, _BLOCK)
        if not block and offset == 0:
            raise _ended(reader, "truncated_shard", "the file is empty", failed="missing_shard")
        if not block and not changes:
            raise _ended(reader, "unterminated_shard", "the file ends without the tar's end mark")
        if len(block) < _BLOCK:
            whole_name = b"\0" in block[:100] and not changes
            cut = block.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            detail = f"the file ends inside a header, at byte {offset}"
            raise _ended(reader, "truncated_shard", detail, cut if whole_name else None)
        if not block.strip(b"\0"):
            return None, offset, ""
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            detail = f"no tar header at byte {offset} ({error}); only uncompressed tars are read"
            raise Defect("corrupt_shard", detail) from error
        offset += _BLOCK
        if header.type not in _EXTENSION_TYPES:
            header.size = int(changes.get("size", header.size))
            return header, offset, changes.get("path", header.name)
        if not 0 <= header.size <= _MAX_EXTENSION_HEADER:
            raise Defect("corrupt_shard", f"an extension header of {header.size} bytes")
        extension = reader.read(offset, header.size)
        if len(extension) < header.size:
            detail = f"the file ends inside a header, at byte {offset}"
            raise _ended(reader, "truncated_shard", detail)
        changes |= _extension_header(header.type, extension)
        offset += _padded(header.size)


def _ended(
    reader: ShardReader,
    cause: str,
    detail: str,
    name: str | None = None,
    *,
    failed: str = "truncated_shard",
) -> Defect:
    """Describe an end of the bytes: as ``failed`` where the source says that it failed."""
    if reader.failure:
        return Defect(failed, f"{reader.failure}; {detail}", name)
    return Defect(cause, detail, name)


_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSION_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XGLTYPE,
    *_PAX_TYPES,
)


def _extension_header(kind: bytes, data: bytes) -> dict[str, str]:
    """Read the name (and size) an extension header gives to the member that follows."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    if kind in _PAX_TYPES:
        while data.strip(b"\0"):  # records "<length> <keyword>=<value>\n"
            digits, _, _ = data.partition(b" ")
            if not digits.isdigit() or len(digits) > 7 or not 4 <= int(digits) <= len(data):
                raise Defect("corrupt_shard", "a damaged pax header")
            record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
            keyword, _, value = record.decode("utf-8", "surrogateescape").partition("=")
            if keyword == "size" and not (value.isdecimal() and len(value) < 20):
                raise Defect("corrupt_shard", "a damaged pax header")
            if keyword in ("path", "size"):
                found[keyword] = value
    return found


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK
