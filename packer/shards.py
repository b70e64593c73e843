"""Tar shards in the webdataset layout: finding, reading with byte offsets, and writing them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from packer.config import PackerConfig
from packer.errors import SkipSample
from packer.source import ShardReader, check_remote, is_remote, open_shard, shard_name, shown
from packer.tar import Defect, Group, Member, grouped, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
"""Members taken as the image, in this order of preference; capitals count as small letters."""

Problem = Callable[[str, str], None]
"""Called with the cause that is counted and a detail that names the place."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members of one sample, as they lie in the shard."""

    key: str
    """``<shard file name>/<member key>``; bare member keys repeat between shards."""
    shard: str
    """Path, URL or command of the shard."""
    offset: int
    """Byte offset of the sample's first header in the shard; `read_samples_at` starts here."""
    members: dict[str, bytes]
    """Content by extension, in small letters and without the dot."""


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """List the shards a specification names.

    Args:
        spec: A path, a brace range (``train-{00000..00008}.tar``), a glob pattern, a folder (all
            its ``*.tar``, sorted), an http(s) URL, a command (``pipe:cat train-{00..08}.tar``, run
            by the shell, which writes the shard to its standard output), several of these joined
            by ``::``, or a sequence of them. URLs and commands may have brace ranges; that they
            exist shows when they are read.

    Returns:
        Paths of existing files, URLs and commands, in the order given.

    Raises:
        ValueError: If a specification names no shard, a file that does not exist, or a URL of
            another scheme, or two shards have the same file name (`packer.source.shard_name`).
    """
    shards: list[str] = []
    for given in [spec] if isinstance(spec, str | Path) else spec:
        found: list[str] = []
        for path in _expand(str(given)):
            found += _shards_at(path, str(given))
        if not found:
            raise ValueError(f"{str(given)!r} must name at least one tar shard; it names none.")
        shards += found
    if not shards:
        raise ValueError("at least one tar shard must be given; got an empty list.")
    by_name: dict[str, str] = {}
    for path in shards:
        other = by_name.setdefault(shard_name(path), path)
        if other != path:
            raise ValueError(
                f"shards must have different file names, which are part of the samples' keys; got "
                f"{shown(other)!r} and {shown(path)!r}, both {shard_name(path)!r}. Rename one."
            )
    return shards


def _expand(given: str) -> list[str]:
    # expand_urls takes backslashes away, which a command may need.
    plain = "{" not in given and "::" not in given if is_remote(given) else Path(given).exists()
    if plain:
        return [given]
    from webdataset.shardlists import expand_urls  # imported here: it takes a second

    try:
        return list(expand_urls(given))
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"braces must hold a range or a list, and ${{NAME}} a variable set as WDS_NAME; in "
            f"{given!r}: {error}. Write a brace that is part of a command as \\{{."
        ) from error


def _shards_at(path: str, given: str) -> list[str]:
    if is_remote(path):
        check_remote(path)
        return [path]
    if Path(path).is_dir():
        return sorted(str(item) for item in Path(path).glob("*.tar"))
    if Path(path).exists():
        return [path]
    matches = sorted(glob(path))
    if not matches:
        raise ValueError(
            f"every shard must exist; {path!r} (from {given!r}) does not. Check the path and the "
            "range in braces."
        )
    return matches


def iter_shard(
    path: str | Path, *, start_offset: int = 0, on_problem: Problem
) -> Iterator[RawSample]:
    """Read a shard's samples in order.

    Neighbouring members form a sample if their paths agree up to the last dot, so ``a.b.jpg`` and
    ``a.c.jpg`` are two samples. Names without an extension or with a leading dot are passed over.

    Args:
        path: The shard: a path, an http(s) URL or a ``pipe:`` command.
        start_offset: Yield only samples that start here or later. What lies before is passed over
            (in a file without being read), but its keys still count as seen.
        on_problem: Called for every defect, after the samples that precede it:

            - ``"duplicate_key"``: a key, or an extension within a sample, comes a second time; the
              later sample, or the whole one, is left out. Interleaved samples end here.
            - ``"truncated_shard"``: the file ends inside a member or header, or a URL or command
              fails after its first byte. The sample that is, or may be, cut is left out.
            - ``"unterminated_shard"``: the file ends after a whole member, but without the
              tar's end mark; nothing more can be said, and all samples are yielded.
            - ``"corrupt_shard"``: what follows is no tar header.
            - ``"missing_shard"``: the file cannot be opened or read, or a URL or command fails
              without giving a byte.
    """
    name = shard_name(path)
    for group, _ in iter_groups(path, start_offset=start_offset, on_problem=on_problem):
        yield _raw_sample(name, path, group)


def iter_groups(
    path: str | Path, *, start_offset: int = 0, on_problem: Problem, most: int | None = None
) -> Iterator[tuple[Group, ShardReader]]:
    """Walk a shard as `iter_shard` does, which says what is yielded and reported.

    Args:
        path: As for `iter_shard`.
        start_offset: As for `iter_shard`.
        on_problem: As for `iter_shard`.
        most: Bytes read of each member of a local file; None reads all. Of a stream all are read.

    Yields:
        Each group, and the reader: where it is seekable, the rest of a member can be read.
    """
    seen = set[str]()
    try:
        with open_shard(path) as reader:
            members = walk(reader, 0, start_offset, most=most if reader.seekable else None)
            for group in grouped(members):
                repeated = group.repeated or group.key in seen
                seen.add(group.key)
                if group.offset < start_offset:
                    continue
                if repeated:
                    where = f"{shown(path)}: {group.key} at byte {group.offset}"
                    on_problem("duplicate_key", where)
                else:
                    yield group, reader
    except Defect as defect:
        on_problem(defect.cause, f"{shown(path)}: {defect.detail}")
    except OSError as error:
        on_problem("missing_shard", f"{shown(path)}: {error}")


def read_samples_at(path: str | Path, offsets: Iterable[int]) -> dict[int, RawSample]:
    """Read the samples that start at byte offsets, as `iter_shard` reported them.

    A file is read there alone; a URL or command once, up to the last of them.

    Args:
        path: As for `iter_shard`.
        offsets: Offsets of samples, in any order.

    Returns:
        The samples by offset.

    Raises:
        ValueError: If no sample starts at one of them, or a URL or command fails.
        OSError: If the shard cannot be opened or read.
    """
    name, found = shard_name(path), dict[int, RawSample]()
    wanted = sorted(set(offsets))
    with open_shard(path) as reader:
        reason = "none does"
        try:
            if reader.seekable:
                for offset in wanted:
                    for group in grouped(walk(reader, offset, offset)):
                        found[group.offset] = _raw_sample(name, path, group)
                        break
            elif wanted:
                among = set(wanted)
                for group in grouped(walk(reader, wanted[0], wanted[0])):
                    if group.offset in among:
                        found[group.offset] = _raw_sample(name, path, group)
                    if group.offset >= wanted[-1]:
                        break
        except Defect as defect:
            reason = f"{defect.cause}, {defect.detail}"
    for offset in wanted:
        if offset not in found:
            raise ValueError(
                f"a sample must start at byte {offset} of {shown(path)}; {reason}. A position is "
                "only valid in the shard it was taken from."
            )
    return found


def _raw_sample(name: str, path: str | Path, group: Group) -> RawSample:
    members = {extension: member.data for extension, member in group.members.items()}
    return RawSample(f"{name}/{group.key}", str(path), group.offset, members)


def image_extension(members: Mapping[str, bytes | Member]) -> str | None:
    """Return the extension of the member that is taken as the image; None where there is none."""
    return next((name for name in IMAGE_EXTENSIONS if name in members), None)


def sample_from_raw(
    raw: RawSample,
    *,
    config: PackerConfig,
    need: Literal["caption", "label", "image"] | None = None,
    on_problem: Problem | None = None,
) -> dict[str, Any]:
    """Turn members into a sample: ``key``, ``image`` (bytes), ``caption`` (txt), ``label`` (cls).

    Args:
        raw: What `iter_shard` read.
        config: Its ``missing_caption`` says whether a missing or empty caption skips the sample.
        need: What the sample is going to be used with. With ``"caption"`` a kept sample always has
            one, perhaps ``""``; with ``"image"`` nothing else is read.
        on_problem: Called with ``"caption_replaced"`` if the caption was not UTF-8 and is decoded
            with replacement.

    Raises:
        SkipSample: ``"missing_image"``, ``"missing_caption"``, ``"missing_label"`` or
            ``"bad_label"``.
    """
    members = raw.members
    extension = image_extension(members)
    if extension is None:
        raise SkipSample("missing_image", f"members: {', '.join(members)}")
    sample: dict[str, Any] = {"key": raw.key, "image": members[extension]}
    if need == "image":
        return sample
    if "txt" in members:
        sample["caption"] = _decode_caption(raw, on_problem)
    if need == "caption" and not sample.get("caption"):
        if config.missing_caption == "skip":
            raise SkipSample("missing_caption", f"members: {', '.join(members)}")
        sample["caption"] = ""
    if "cls" in members and need != "caption":
        sample["label"] = class_index(members["cls"])
    if need == "label" and "label" not in sample:
        raise SkipSample("missing_label", f"members: {', '.join(members)}")
    return sample


def class_index(data: bytes) -> int:
    """Read the content of a ``.cls`` member, which must fit a batch's int64 labels.

    Raises:
        SkipSample: ``"bad_label"``.
    """
    try:
        label = int(data)
    except ValueError as error:
        raise SkipSample("bad_label", f"a .cls must hold an integer; {error}") from error
    if not -(2**63) <= label < 2**63:
        raise SkipSample("bad_label", f"a .cls must hold a 64-bit integer; got {data[:40]!r}")
    return label


def _decode_caption(raw: RawSample, on_problem: Problem | None) -> str:
    text = raw.members["txt"]
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        if on_problem is not None:
            on_problem("caption_replaced", f"{shown(raw.shard)}: {raw.key}: {error}")
        return text.decode("utf-8-sig", "replace").strip()


def write_shards(
    samples: Iterable[Mapping[str, Any]], target: str | Path, *, samples_per_shard: int = 1000
) -> list[str]:
    """Write samples as webdataset shards; equal samples give equal bytes.

    Args:
        samples: Mappings with ``image`` (encoded bytes) and any of ``key`` (default: the running
            number), ``caption``, ``label`` (int) and ``json`` (a mapping).
        target: A path with a ``%d`` field (``train-%05d.tar``), or a folder for ``%05d.tar``.
        samples_per_shard: Samples a shard, the last one excepted.

    Returns:
        Paths of the shards. Each appears under its name only when it is whole.

    Raises:
        ValueError: If an image is not encoded bytes of a known format, or a key comes twice.
    """
    from webdataset.writer import TarWriter  # imported here: it takes a second

    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1; got {samples_per_shard}.")
    pattern = str(target) if "%" in Path(target).name else str(Path(target) / "%05d.tar")
    paths: list[str] = []
    seen: set[str] = set()
    numbered = enumerate(samples)
    for first in numbered:
        path = Path(pattern % len(paths))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        # A fixed time and owner: the bytes then depend on the samples alone.
        with (
            part.open("wb") as file,
            TarWriter(file, user="", group="", encoder=False, mtime=0) as tar,
        ):
            for index, sample in chain([first], islice(numbered, samples_per_shard - 1)):
                members = _to_members(sample, index)
                if members["__key__"] in seen:
                    raise ValueError(f"keys must be unique; {members['__key__']!r} comes twice.")
                seen.add(members["__key__"])
                tar.write(members)
        part.replace(path)
        paths.append(str(path))
    return paths


def _to_members(sample: Mapping[str, Any], index: int) -> dict[str, Any]:
    image = sample.get("image")
    start = image[:16] if isinstance(image, bytes) else b""
    extension = next((name for name, at, mark in _MAGIC if start[at:].startswith(mark)), None)
    if extension is None:
        raise ValueError(
            "an image must be the bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM file; "
            f"got {type(image).__name__} {start!r}. Encode it first."
        )
    members = {"__key__": str(sample.get("key", f"{index:06d}")), extension: image}
    if sample.get("caption") is not None:
        members["txt"] = sample["caption"].encode()
    if sample.get("label") is not None:
        members["cls"] = b"%d" % sample["label"]
    if sample.get("json") is not None:
        members["json"] = json.dumps(sample["json"], sort_keys=True).encode()
    return members


_MAGIC = (
    ("jpg", 0, b"\xff\xd8\xff"),
    ("png", 0, b"\x89PNG"),
    ("webp", 8, b"WEBP"),
    ("gif", 0, b"GIF8"),
    ("bmp", 0, b"BM"),
    ("tif", 0, b"II*\0"),
    ("tif", 0, b"MM\0*"),
    ("avif", 4, b"ftypavi"),
    ("ppm", 0, b"P6"),
)
