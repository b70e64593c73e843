import gc
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packer.config import PackerConfig
from packer.errors import SkipSample
from packer.shards import (
    RawSample,
    expand_shards,
    iter_shard,
    read_samples_at,
    sample_from_raw,
    write_shards,
)

JPEG = b"\xff\xd8\xff" + bytes(range(256)) * 3
LONG = "folder/" * 20 + "ü" * 60


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(count)
        for member in ((f"{i:03d}.jpg", JPEG + bytes(i * 300)), (f"{i:03d}.txt", b"caption %d" % i))
    ]


def read(path: Path, **options: Any) -> tuple[list[RawSample], list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    samples = list(iter_shard(path, on_problem=lambda *p: problems.append(p), **options))
    return samples, problems


def keys(samples: list[RawSample]) -> list[str]:
    return [sample.key.partition("/")[2] for sample in samples]


name = st.sampled_from(["a", "b/c", "x.y", "long" * 24, LONG, "q" * 150, "ä.ö"])
entry = st.tuples(name, st.sampled_from(["jpg", "txt", "json"]), st.binary(max_size=1300))


@settings(deadline=None, max_examples=60)
@given(
    entries=st.lists(entry, max_size=8, unique_by=lambda e: e[:2]),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_of_tarfile(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str, bytes]], kind: int
) -> None:
    entries.sort(key=lambda e: e[0])
    path = tmp_path_factory.getbasetemp() / "any.tar"
    write_tar(path, [(f"{key}.{ext}", data) for key, ext, data in entries], kind)
    expected: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            stem, _, ext = member.name.rpartition(".")
            expected.setdefault(stem, {})[ext] = tar.extractfile(member).read()

    samples, problems = read(path)

    assert {sample.key: sample.members for sample in samples} == {
        f"any.tar/{stem}": members for stem, members in expected.items()
    }
    assert not problems
    offsets = [sample.offset for sample in samples]
    assert list(read_samples_at(path, reversed(offsets)).values()) == samples
    for start in samples:
        resumed, _ = read(path, start_offset=start.offset)
        assert resumed == samples[samples.index(start) :]


def test_folders_links_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        for member, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, "t" * 120
            tar.addfile(info)
        for member in ("./d/1.JPG", "d/._1.jpg", "d/.hidden", "README", "./d/1.txt"):
            info = tarfile.TarInfo(member)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    samples, problems = read(path)
    assert [(s.key, list(s.members)) for s in samples] == [("s.tar/d/1", ["jpg", "txt"])]
    assert not problems


def test_keys_that_agree_up_to_the_first_dot_are_not_merged(tmp_path: Path) -> None:
    names = ["a.b.jpg", "a.b.txt", "a.c.jpg", "a.c.txt", "v1.0/a.jpg", "v1.0/a.txt"]
    samples, problems = read(write_tar(tmp_path / "s.tar", [(n, n.encode()) for n in names]))
    assert keys(samples) == ["a.b", "a.c", "v1.0/a"]
    assert samples[1].members == {"jpg": b"a.c.jpg", "txt": b"a.c.txt"}
    assert not problems


@pytest.mark.parametrize(
    ("names", "kept", "bad"),
    [
        (["a.jpg", "a.jpg", "b.jpg"], ["b"], ["a"]),
        (["a.jpg", "a.JPG", "b.jpg"], ["b"], ["a"]),
        (["a.jpg", "b.jpg", "a.jpg", "c.jpg"], ["a", "b", "c"], ["a"]),
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], ["a", "b"], ["a", "b"]),
        (["a.jpg", "a.txt", "a.txt", "b.jpg", "a.jpg"], ["b"], ["a", "a"]),
    ],
)
def test_repeated_and_interleaved_keys_are_counted_and_never_merged(
    tmp_path: Path, names: list[str], kept: list[str], bad: list[str]
) -> None:
    path = write_tar(tmp_path / "s.tar", [(n, b"%d" % i) for i, n in enumerate(names)])
    samples, problems = read(path)
    assert keys(samples) == kept
    assert [cause for cause, _ in problems] == ["duplicate_key"] * len(bad)
    assert all(f": {key} at" in detail for key, (_, detail) in zip(bad, problems, strict=True))
    # Resuming remembers the keys before the offset, so it goes on as the first pass did.
    for at, sample in enumerate(samples):
        assert read(path, start_offset=sample.offset)[0] == samples[at:]


class TestCutShards:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> Path:
        return write_tar(tmp_path / "cut.tar", pairs(3))

    @pytest.fixture
    def offsets(self, whole: Path) -> dict[str, int]:
        with tarfile.open(whole) as tar:
            return {m.name: m.offset for m in tar} | {m.name + " data": m.offset_data for m in tar}

    def cut(self, path: Path, size: int) -> tuple[list[str], list[tuple[str, str]]]:
        os.truncate(path, size)
        samples, problems = read(path)
        assert all("cut.tar" in detail for _, detail in problems)
        return keys(samples), [(cause, detail) for cause, detail in problems]

    def test_inside_an_image(self, whole: Path, offsets: dict[str, int]) -> None:
        found, problems = self.cut(whole, offsets["002.jpg data"] + 700)
        assert found == ["000", "001"]
        assert [cause for cause, _ in problems] == ["truncated_shard"]
        assert "002.jpg" in problems[0][1]

    def test_inside_a_caption(self, whole: Path, offsets: dict[str, int]) -> None:
        found, problems = self.cut(whole, offsets["002.txt data"] + 3)
        assert found == ["000", "001"]
        assert [cause for cause, _ in problems] == ["truncated_shard"]

    def test_inside_the_header_of_the_next_sample(
        self, whole: Path, offsets: dict[str, int]
    ) -> None:
        found, problems = self.cut(whole, offsets["002.jpg"] + 300)
        assert found == ["000", "001"]
        assert [cause for cause, _ in problems] == ["truncated_shard"]

    def test_inside_a_header_of_the_same_sample(self, whole: Path, offsets: dict[str, int]) -> None:
        for length in (1, 300):  # with the name unreadable, and readable
            found, problems = self.cut(whole, offsets["001.txt"] + 301 - length)
            assert found == ["000"]
            assert [cause for cause, _ in problems] == ["truncated_shard"]

    def test_between_members_or_without_end_blocks(
        self, whole: Path, offsets: dict[str, int]
    ) -> None:
        end = offsets["002.txt data"] + 512
        for size, last in ((end, ["jpg", "txt"]), (offsets["002.txt"], ["jpg"])):
            os.truncate(whole, size)
            samples, problems = read(whole)
            assert keys(samples) == ["000", "001", "002"]
            assert list(samples[-1].members) == last
            assert [cause for cause, _ in problems] == ["unterminated_shard"]

    def test_in_a_long_name(self, tmp_path: Path) -> None:
        for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            members = [("a.jpg", b"1"), (LONG + ".jpg", b"2")]
            path = write_tar(tmp_path / "cut.tar", members, kind)
            assert keys(read(path)[0]) == ["a", LONG]
            for size in (1024 + 100, 1024 + 512, 1024 + 520, 1024 + 1024, 1024 + 1100):
                path = write_tar(tmp_path / "cut.tar", members, kind)
                _, problems = self.cut(path, size)
                assert [cause for cause, _ in problems] == ["truncated_shard"]

    def test_everywhere(self, whole: Path) -> None:
        data = whole.read_bytes()
        expected = {s.key: s.members for s in read(whole)[0]}
        for size in range(0, len(data), 97):
            whole.write_bytes(data[:size])
            for sample in read(whole)[0]:
                full = expected[sample.key]
                assert sample.members.items() <= full.items()

    def test_a_damaged_header_ends_the_shard_and_is_reported(
        self, whole: Path, offsets: dict[str, int]
    ) -> None:
        data = bytearray(whole.read_bytes())
        data[offsets["001.jpg"] + 5] ^= 1
        whole.write_bytes(data)
        samples, problems = read(whole)
        assert keys(samples) in ([], ["000"])
        assert [cause for cause, _ in problems] == ["corrupt_shard"]
        assert f"byte {offsets['001.jpg']}" in problems[0][1]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "truncated_shard"),
        (b"\x1f\x8b" + b"x" * 2000, "corrupt_shard"),
        (b"x", "truncated_shard"),
    ],
)
def test_a_file_that_is_no_tar_gives_no_sample(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    assert [c for c, _ in read(path)[1]] == [cause]


@settings(deadline=None, max_examples=100)
@given(at=st.floats(0, 1), value=st.integers(0, 255), pax=st.booleans())
def test_a_damaged_byte_never_raises(
    tmp_path_factory: pytest.TempPathFactory, at: float, value: int, pax: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    kind = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    write_tar(path, [("a.jpg", b"1"), (LONG + ".jpg", b"2" * 600), ("b.jpg", b"3")], kind)
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] = value
    path.write_bytes(data)
    read(path)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(b"9" * 5000 + b" size=1\n", id="length of 5,000 digits"),
        pytest.param(b"5012 size=" + b"9" * 5001 + b"\n", id="size of 5,000 digits"),
        pytest.param("11 size=²\n".encode(), id="a digit that is no number"),
        pytest.param(b"11 size=-1\n", id="negative size"),
    ],
)
def test_a_number_in_a_pax_header_that_is_none_is_reported(tmp_path: Path, record: bytes) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("x.pax", record), ("b.jpg", b"2")])
    data = bytearray(path.read_bytes())
    block = data[1024:1536]
    block[156:157], block[148:156] = tarfile.XHDTYPE, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data[1024:1536] = block
    path.write_bytes(data)
    samples, problems = read(path)
    assert keys(samples) == []  # what follows may have been another member of the first one
    assert [(cause, detail.rpartition(": ")[2]) for cause, detail in problems] == [
        ("corrupt_shard", "a damaged pax header")
    ]


def test_a_missing_shard_is_reported_when_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.tar", tmp_path):
        samples, problems = read(path)
        assert not samples
        assert [cause for cause, _ in problems] == ["missing_shard"]


def test_a_reader_that_stops_early_leaves_no_file_open(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", pairs(3))
    folder = Path("/proc/self/fd")

    def is_open() -> bool:
        return any(os.readlink(link) == str(path) for link in folder.iterdir() if link.is_symlink())

    samples = iter_shard(path, on_problem=lambda *_: None)
    next(samples)
    if folder.exists():
        assert is_open()
    del samples
    gc.collect()  # an unclosed file would be a ResourceWarning, hence an error
    read_samples_at(path, [0])
    if folder.exists():
        assert not is_open()


def test_an_offset_where_no_sample_starts_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", pairs(2))
    for offset in (512, 10**6):
        with pytest.raises(ValueError, match=f"must start at byte {offset}"):
            read_samples_at(path, [0, offset])
    with pytest.raises(OSError, match="none"):
        read_samples_at(tmp_path / "none.tar", [0])


def test_brace_ranges_globs_folders_and_lists_expand(tmp_path: Path) -> None:
    paths = [str(write_tar(tmp_path / f"t-{i:02d}.tar", [])) for i in range(3)]
    literal = str(write_tar(tmp_path / "odd{1..2}.tar", []))
    assert expand_shards(f"{tmp_path}/t-{{00..02}}.tar") == paths
    assert expand_shards(f"{tmp_path}/t-*.tar") == paths
    assert expand_shards(f"{paths[1]}::{paths[0]}") == [paths[1], paths[0]]
    assert expand_shards([Path(paths[2]), f"{tmp_path}/t-0{{0,1}}.tar"]) == [
        paths[2],
        *paths[:2],
    ]
    assert expand_shards(literal) == [literal]
    assert expand_shards(tmp_path) == [literal, *paths]


def test_what_names_no_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "t-00.tar").touch()
    (tmp_path / "empty").mkdir()
    for spec in ("t-{00..01}.tar", "none.tar", "none-*.tar", "empty"):
        with pytest.raises(ValueError, match="must") as caught:
            expand_shards(str(tmp_path / spec))
        assert spec in str(caught.value)
    with pytest.raises(ValueError, match=r"local files, http\(s\) URLs or 'pipe:'.*s3 cp URL -"):
        expand_shards("s3://bucket/a-{0..3}.tar")
    with pytest.raises(ValueError, match="empty list"):
        expand_shards([])


def test_equal_samples_are_written_as_equal_bytes_and_read_back(tmp_path: Path) -> None:
    samples = [
        {"key": "dir/ä.1", "image": JPEG, "caption": "größe", "label": 3, "json": {"b": 1, "a": 2}},
        {"image": b"\x89PNG\r\n\x1a\n123"},
        {"image": b"RIFF....WEBPVP8 ", "caption": ""},
    ]
    first = write_shards(iter(samples), tmp_path / "a", samples_per_shard=2)
    second = write_shards(samples, tmp_path / "b" / "x-%03d.tar", samples_per_shard=2)
    assert [Path(p).name for p in first + second] == [
        "00000.tar",
        "00001.tar",
        "x-000.tar",
        "x-001.tar",
    ]
    assert [Path(p).read_bytes() for p in first] == [Path(p).read_bytes() for p in second]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["00000.tar", "00001.tar"]
    raw = [sample for path in first for sample in read(Path(path))[0]]
    assert keys(raw) == ["dir/ä.1", "000001", "000002"]
    assert json.loads(raw[0].members["json"]) == {"a": 2, "b": 1}
    assert sample_from_raw(raw[0], config=PackerConfig()) == {
        "key": "00000.tar/dir/ä.1",
        "image": JPEG,
        "caption": "größe",
        "label": 3,
    }
    assert list(raw[1].members) == ["png"]
    assert list(raw[2].members) == ["txt", "webp"]
    assert write_shards([], tmp_path / "c") == []


def test_samples_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        write_shards([{"key": "a", "image": JPEG}] * 2, tmp_path, samples_per_shard=1)
    for image in (b"text", None):
        with pytest.raises(ValueError, match="Encode it first"):
            write_shards([{"image": image}], tmp_path / "x")
    with pytest.raises(ValueError, match="samples_per_shard"):
        write_shards([], tmp_path, samples_per_shard=0)


def raw_sample(**members: bytes) -> RawSample:
    return RawSample("s.tar/a", "s.tar", 0, members)


@pytest.mark.parametrize(
    ("members", "need", "cause"),
    [
        ({"txt": b"a"}, None, "missing_image"),
        ({"jpg": b"1"}, "caption", "missing_caption"),
        ({"jpg": b"1", "txt": b" \n"}, "caption", "missing_caption"),
        ({"jpg": b"1", "txt": b"a"}, "label", "missing_label"),
        ({"jpg": b"1", "cls": b"cat"}, "label", "bad_label"),
        ({"jpg": b"1", "cls": b"9" * 30}, "label", "bad_label"),
        ({"jpg": b"1", "cls": b"9" * 5000}, "label", "bad_label"),
    ],
)
def test_an_incomplete_sample_is_a_skip(members: dict[str, bytes], need: Any, cause: str) -> None:
    with pytest.raises(SkipSample) as caught:
        sample_from_raw(raw_sample(**members), config=PackerConfig(), need=need)
    assert caught.value.cause == cause


def test_of_a_sample_that_is_an_image_alone_nothing_else_is_read() -> None:
    members = {"jpg": b"1", "txt": b"caf\xe9", "cls": b"no number"}
    sample = sample_from_raw(
        raw_sample(**members), config=PackerConfig(), need="image", on_problem=pytest.fail
    )
    assert sample == {"key": "s.tar/a", "image": b"1"}


def test_a_missing_caption_can_be_kept_as_empty() -> None:
    config = PackerConfig(missing_caption="keep")
    for members in ({}, {"txt": b""}):
        sample = sample_from_raw(raw_sample(jpg=b"1", **members), config=config, need="caption")
        assert sample["caption"] == ""
    assert "caption" not in sample_from_raw(raw_sample(jpg=b"1"), config=config)


def test_a_caption_that_is_not_utf_8_is_replaced_and_noted() -> None:
    problems: list[str] = []
    for text, expected in ((b"caf\xe9", "caf\ufffd"), (b"\xef\xbb\xbf ok\n", "ok")):
        sample = sample_from_raw(
            raw_sample(jpg=b"1", txt=text),
            config=PackerConfig(),
            need="caption",
            on_problem=lambda cause, _: problems.append(cause),
        )
        assert sample["caption"] == expected
    assert problems == ["caption_replaced"]


def test_the_image_is_found_by_extension_and_the_label_is_an_integer() -> None:
    for extension in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm"):
        members = {"json": b"{}", extension: b"1", "cls": b" 12\n"}
        sample = sample_from_raw(raw_sample(**members), config=PackerConfig(), need="label")
        assert sample == {"key": "s.tar/a", "image": b"1", "label": 12}
