"""The size index changes no plan, whatever its state, and saves every header."""

import importlib
import io
import json
import logging
import os
import random
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from packer import size_index
from packer.batch import BatchStats, PackedBatch
from packer.config import PackerConfig
from packer.decode import ImageInfo, read_size
from packer.errors import SkipSample
from packer.plan.drop import BetaDrop
from packer.plan.place import Placement
from packer.plan.types import ImageSize
from packer.shards import iter_shard
from packer.size_index import ShardIndex, index_path, index_shard, read_index, write_index
from packer.stream import LoaderState, PackedStream
from tests.helpers.samples import (
    BROKEN,
    assert_same_batches,
    drain,
    image_samples,
    make_shards,
    noise,
    png,
)

P = 8


def encoded(kind: str, height: int, width: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(height, width)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(height: int, width: int) -> bytes:
    """Encode a JPEG that EXIF turns by 90 degrees, with 60 kB of comment before its size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", height, width, exif=exif, comment=b"x" * 60_000, quality=95)


def every_kind() -> list[dict[str, Any]]:
    """Samples with every entry an index can have, some larger than the part that is read first."""
    images: list[bytes | None] = [
        turned(16, 24),
        encoded("JPEG", 240, 320, quality=100),
        png(200, 210),
        encoded("WEBP", 180, 200, lossless=True),
        encoded("TIFF", 170, 180),
        encoded("GIF", 8, 9),
        BROKEN,
        png(8, 16)[:20],
    ]
    samples = [{"key": f"k{i}", "image": image, "caption": "a"} for i, image in enumerate(images)]
    return [*samples, {"key": "none", "caption": "a"}]


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """One shard of `every_kind`; the last sample has no image."""
    samples = every_kind()
    [path] = make_shards(tmp_path, samples[:-1], 100)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("none.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"a"))
    return path


def test_an_index_states_what_headers_state(shard: str) -> None:
    index = index_shard(shard)
    samples = list(iter_shard(shard, on_problem=lambda *_: pytest.fail("a problem")))
    assert index.offsets == tuple(sample.offset for sample in samples)
    assert index.keys == tuple(sample.key.partition("/")[2] for sample in samples)
    images = [max(sample.members.values(), key=len) for sample in samples]
    assert index.infos == (*map(read_size, images[:6]), None, None, None)
    assert index.infos[0] == ImageInfo(ImageSize(24, 16), 6)
    assert index.causes == {6: "decode_error", 7: "decode_error", 8: "missing_image"}
    assert index.skipped == {"decode_error": 2, "missing_image": 1}
    assert index.sizes.dtype == np.int32
    expected = [[24, 16], [240, 320], [200, 210], [180, 200], [170, 180], [8, 9]]
    assert index.sizes.tolist() == expected
    stat = os.stat(shard)
    assert (index.shard_size, index.shard_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_only_the_start_of_an_image_is_read(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def measured(image: bytes, **options: Any) -> ImageInfo:
        lengths.append(len(image))
        return read_size(image, **options)

    monkeypatch.setattr("packer.size_index.read_size", measured)
    images = [len(sample["image"]) for sample in every_kind()[:-1]]
    assert index_shard(shard).sizes.shape == (6, 2)
    # WebP and TIFF are opened whole: their headers need not be at the front.
    assert min(images[1:5]) > 1 << 16
    assert lengths == [images[0], 1 << 16, 1 << 16, images[3], images[4], *images[5:]]


@pytest.mark.parametrize("kind", ["exif", "JPEG", "PNG", "GIF", "BMP"])
def test_the_start_of_a_file_says_what_the_whole_says_or_nothing(kind: str) -> None:
    """Only where that holds may a header be read from a part of the file."""
    whole = turned(160, 240) if kind == "exif" else encoded(kind, 40, 56)
    assert whole.startswith(size_index._FRONT_HEADERS)
    expected, found = read_size(whole), 0
    for length in [*range(0, min(len(whole), 1500), 7), *range(1500, len(whole), 997)]:
        with suppress(SkipSample):
            assert read_size(whole[:length]) == expected
            found += 1
    assert found > 2


def test_of_a_command_or_a_url_the_sizes_are_read_too(shard: str) -> None:
    index = index_shard(f"pipe:cat {shard}")
    local = index_shard(shard)
    assert (index.infos, index.causes, index.offsets) == (local.infos, local.causes, local.offsets)
    assert not write_index(f"pipe:cat {shard}", index)
    assert read_index(f"pipe:cat {shard}") is None


def test_a_shard_with_defects_is_indexed_as_far_as_it_is_read(shard: str) -> None:
    whole = index_shard(shard)
    os.truncate(shard, whole.offsets[3] + 1100)
    problems: list[str] = []
    index = index_shard(shard, on_problem=lambda cause, _: problems.append(cause))
    assert index.infos == whole.infos[:3]
    assert problems == ["truncated_shard"]
    Path(shard).unlink()
    index = index_shard(shard, on_problem=lambda cause, _: problems.append(cause))
    assert (index.sizes.shape, problems[1:]) == ((0, 2), ["missing_shard"])


sides = st.integers(1, 2**31 - 1)
infos = st.one_of(
    st.builds(ImageInfo, st.builds(ImageSize, sides, sides), st.integers(1, 8)), st.none()
)


@given(
    rows=st.lists(st.tuples(st.integers(0, 2**60), st.text(), infos), max_size=6),
    damage=st.floats(0, 1, exclude_max=True),
    value=st.integers(1, 255),
)
def test_an_index_is_read_back_as_it_was_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, str, ImageInfo | None]],
    damage: float,
    value: int,
) -> None:
    shard = tmp_path_factory.getbasetemp() / "indexed.tar"
    shard.write_bytes(b"content")
    stat = shard.stat()
    index = ShardIndex(
        stat.st_size,
        stat.st_mtime_ns,
        tuple(offset for offset, _, _ in rows),
        tuple(key for _, key, _ in rows),
        tuple(info for _, _, info in rows),
        {at: "decode_error" for at, (_, _, info) in enumerate(rows) if info is None},
    )
    assert write_index(shard, index)
    assert read_index(shard) == index
    path = index_path(shard)
    stored = path.read_bytes()
    at = int(damage * len(stored))
    path.write_bytes(stored[:at])
    assert read_index(shard) is None
    path.write_bytes(stored[:at] + bytes([stored[at] ^ value]) + stored[at + 1 :])
    # In the first line a changed character may be a space more, or a time that is not this one's.
    assert read_index(shard) in (None, index)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"null\n", b"[]\n[]", b"{}\n", b"\xff\n", b"[" * 9]
)
def test_garbage_is_no_index(shard: str, content: bytes) -> None:
    index_path(shard).write_bytes(content)
    assert read_index(shard) is None
    index_path(shard).write_bytes(content * 20_000)
    assert read_index(shard) is None


def test_an_index_is_valid_only_for_the_very_file(shard: str) -> None:
    index = index_shard(shard)
    assert write_index(shard, index)
    assert read_index(shard) == index
    stat = os.stat(shard)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert read_index(shard) is None
    assert not write_index(shard, index), "it is that of another file by now"
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_index(shard) == index
    with open(shard, "ab") as file:
        file.write(b"\0")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_index(shard) is None


def test_a_folder_that_cannot_be_written_to_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(tmp_path, image_samples(4), 2)
    for path in shards:
        index_path(path).mkdir()  # a file cannot take its place
    with caplog.at_level(logging.WARNING, "packer"):
        assert [write_index(path, index_shard(path)) for path in shards] == [False, False]
    assert caplog.text.count("no size index is stored in") == 1
    assert sorted(tmp_path.glob("*.part")) == []


# In a stream


def config(**options: Any) -> PackerConfig:
    placement = Placement("exact", window=6, max_age=12)
    return PackerConfig(
        **{"patch_size": P, "seq_len": 32, "placement": placement, "token_drop": BetaDrop()}
        | options
    )


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """46 samples in 5 shards, broken in every way that shows in a header, and some that do not."""
    samples: list[dict[str, Any]] = image_samples(46, unit=P)
    samples[3]["image"] = BROKEN
    samples[14]["image"] = turned(16, 24)
    samples[22]["image"] = png(8, 8)[:60]
    samples[31]["caption"] = None
    samples[40]["image"] = png(300, 200)
    return make_shards(tmp_path, samples, 10)


def run(shards: list[str], *, workers: int = 0, limit: int | None = None, **options: Any) -> Any:
    settings = config(**options.pop("config", {}))
    options = {"sequences_per_batch": 2, "epochs": 1, "shuffle_window": 4} | options
    stream = PackedStream(shards, settings, **options)
    return drain(DataLoader(stream, batch_size=None, num_workers=workers), limit)


def count_headers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images whose header is read."""
    count = [0]

    def counted(image: Any, **options: Any) -> ImageInfo:
        count[0] += 1
        return read_size(image, **options)

    for name in ("packer.pack", "packer.size_index"):  # `packer.pack` alone is the function
        monkeypatch.setattr(importlib.import_module(name), "read_size", counted)
    return count


def total(batches: list[PackedBatch]) -> BatchStats:
    return sum((batch.stats for batch in batches), BatchStats())


@pytest.mark.parametrize("options", [{}, {"max_pixels": 50_000}, {"max_aspect_ratio": 2.0}])
def test_batches_are_the_same_with_and_without(
    shards: list[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(shards, config=options)
    assert not any(index_path(path).exists() for path in shards)
    assert total(plain).skipped["decode_error"] == 2
    headers = count_headers(monkeypatch)
    assert_same_batches(run(shards, config=options, size_index=True), plain)
    assert headers == [46]
    assert [read_index(path) for path in shards] == [index_shard(path) for path in shards]
    headers[0] = 0
    assert_same_batches(run(shards, config=options, size_index=True), plain)
    assert headers == [0], "a second pass reads no header"


def test_an_index_serves_any_configuration_and_any_number_of_streams(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shards, size_index=True, config={"max_pixels": 1000})
    for num_streams in (1, 3, 7):  # 7: streams share the shards
        options = {"num_streams": num_streams, "config": {"patch_size": 4, "max_tokens": 30}}
        plain = run(shards, **options)
        headers = count_headers(monkeypatch)
        assert_same_batches(run(shards, size_index=True, workers=0, **options), plain)
        assert headers == [0]


def test_streams_that_share_shards_store_no_part_of_an_index(shards: list[str]) -> None:
    options = {"num_streams": 7, "workers": 2}
    assert_same_batches(run(shards, size_index=True, **options), run(shards, **options))
    assert not any(index_path(path).exists() for path in shards)


def test_every_epoch_but_the_first_reads_no_header(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = count_headers(monkeypatch)
    batches = run(shards, size_index=True, epochs=3)
    assert headers == [46]
    assert_same_batches(batches, run(shards, epochs=3))


@pytest.mark.parametrize("state", ["stale", "truncated", "garbage", "wrong", "partial"])
def test_an_index_in_any_state_changes_nothing_and_is_made_again(
    shards: list[str], state: str
) -> None:
    plain = run(shards)
    for path in shards:
        index = index_shard(path)
        write_index(path, index)
        stored = index_path(path)
        content = stored.read_bytes()
        if state == "stale":
            stored.write_bytes(content.replace(str(index.shard_mtime_ns).encode(), b"1"))
        elif state == "truncated":
            stored.write_bytes(content[: len(content) // 2])
        elif state == "garbage":
            stored.write_bytes(random.Random(0).randbytes(300))
        elif state == "wrong":
            start, _, body = content.partition(b"\n")
            stored.write_bytes(start + b"\n" + body.replace(b"8", b"9"))
        else:  # whole, but without some samples, as if the shard had been read to there
            part = ShardIndex(*json_identity(content), index.offsets[:3], *index_columns(index, 3))
            write_index(path, part)
    assert_same_batches(run(shards, size_index=True), plain)
    if state != "partial":
        assert [read_index(path) for path in shards] == [index_shard(path) for path in shards]


def json_identity(content: bytes) -> tuple[int, int]:
    header = json.loads(content.partition(b"\n")[0])
    return header["shard_size"], header["shard_mtime_ns"]


def index_columns(index: ShardIndex, count: int) -> tuple[Any, Any, Any]:
    causes = {at: cause for at, cause in index.causes.items() if at < count}
    return index.keys[:count], index.infos[:count], causes


def test_a_run_that_stops_within_a_shard_resumes_and_leaves_no_part_of_an_index(
    shards: list[str],
) -> None:
    plain = run(shards)
    state = LoaderState()
    for batch in run(shards, size_index=True, limit=2):
        state.update(batch)
    assert 0 < sum(index_path(path).exists() for path in shards) < 4
    assert_same_batches(run(shards, size_index=True, state=state), plain[2:])
    for path in shards:
        assert read_index(path) in (None, index_shard(path))
    assert sum(index_path(path).exists() for path in shards) == 4, "all but the one resumed in"


def test_a_shard_that_changes_while_it_is_read_gets_no_index(shards: list[str]) -> None:
    stream = PackedStream(
        shards[:1], config(seq_len=30), sequences_per_batch=1, epochs=1, size_index=True
    )
    batches = iter(stream)
    next(batches)
    assert not index_path(shards[0]).exists(), "it must not be at the shard's end yet"
    os.utime(shards[0])
    list(batches)
    assert not index_path(shards[0]).exists()
