"""What the inputs of `navit embed` name: folders, lists, images, shards, in any mixture."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.embed.inputs import Inputs, find_inputs
from packer.errors import SkipSample
from packer.shards import write_shards
from tests.helpers.samples import png


def keys(inputs: Inputs) -> list[str]:
    return [item.key for chunk in inputs.chunks for item in chunk.read()]


def lost(inputs: Inputs) -> list[tuple[str, str]]:
    items = (item for chunk in inputs.chunks for item in chunk.read())
    return [(item.key, item.image.cause) for item in items if isinstance(item.image, SkipSample)]


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def shard(folder: Path, name: str, count: int, seed: int = 0) -> str:
    samples = [
        {"key": f"{i:03d}", "image": png(8, 8, seed + i), "caption": "x"} for i in range(count)
    ]
    (path,) = write_shards(samples, folder / f"{name}-%05d.tar", samples_per_shard=max(count, 1))
    return path


def test_a_folder_gives_its_images_sorted_to_any_depth_and_nothing_else(tmp_path: Path) -> None:
    images = ["b.JPG", "a/z.png", "a/b/c.webp", "a.tiff", "ü n.gif"]
    make(tmp_path, *images, "notes.txt", "a/.hidden.jpg", "._b.jpg", ".git/x.png", "noextension")
    (tmp_path / "link.avif").symlink_to(tmp_path / "b.JPG")

    inputs = find_inputs([str(tmp_path)], chunk_size=4)

    expected = sorted(os.path.join(tmp_path, name) for name in [*images, "link.avif"])
    assert keys(inputs) == expected
    assert inputs.count == 6
    assert inputs.ignored == 2
    assert [len(list(chunk.read())) for chunk in inputs.chunks] == [4, 2]


def test_a_list_gives_its_lines_in_their_order_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes("\ufeffb.jpg\r\n\n# a.png\n  c d.gif \nb.jpg".encode())

    inputs = find_inputs([str(path)], chunk_size=10)

    assert keys(inputs) == ["b.jpg", "# a.png", "  c d.gif ", "b.jpg"]


def test_neighbouring_files_share_chunks_and_shards_begin_their_own(tmp_path: Path) -> None:
    make(tmp_path, "photos/a.jpg", "photos/b.jpg", "one.png")
    (tmp_path / "list.txt").write_text("x.jpg\ny.jpg\n")
    first, second = shard(tmp_path, "first", 5), shard(tmp_path, "second", 1)
    given_ = [f"{tmp_path}/{name}" for name in ("photos", "one.png", "list.txt")]

    inputs = find_inputs([*given_, first, second, given_[1]], chunk_size=3)

    assert [len(list(chunk.read())) for chunk in inputs.chunks] == [3, 2, 3, 2, 1, 1]
    assert inputs.count == 12
    assert keys(inputs)[5:11] == [f"first-00000.tar/{i:03d}" for i in range(5)] + [
        "second-00000.tar/000"
    ]


def test_brace_ranges_globs_and_folders_of_shards_name_the_same(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path, "s", 2).replace("", "")
        Path(tmp_path / "s-00000.tar").rename(tmp_path / f"t-{i}.tar")

    ways = [f"{tmp_path}/t-{{0..2}}.tar", f"{tmp_path}/t-*.tar", str(tmp_path)]
    found = [find_inputs([way], chunk_size=9) for way in ways]

    assert len({inputs.fingerprint for inputs in found}) == 1
    assert all(inputs.count == 6 for inputs in found)


def test_a_command_s_shard_is_one_chunk_of_unknown_number(tmp_path: Path) -> None:
    path = shard(tmp_path, "s", 7)

    inputs = find_inputs([f"pipe:cat {path}"], chunk_size=2)

    assert inputs.count is None
    assert len(inputs.chunks) == 1
    assert keys(inputs) == keys(find_inputs([path], chunk_size=2))


def test_what_a_shard_has_lost_is_told_after_its_samples(tmp_path: Path) -> None:
    path = Path(shard(tmp_path, "s", 4))
    path.write_bytes(path.read_bytes()[:-11000])  # ends within the last sample

    local, piped = (find_inputs([name], chunk_size=2) for name in (str(path), f"pipe:cat {path}"))

    assert local.count == len(keys(local)) - 1
    assert [cause for _, cause in lost(local)] == ["truncated_shard"]
    assert keys(local)[:-1] == keys(piped)[:-1]
    assert [cause for _, cause in lost(piped)] == ["truncated_shard"]


def test_samples_without_an_image_and_keys_of_two_lines_are_failures(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.txt", "b.png", "c\nd.png"):
            data = png(8, 8)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    inputs = find_inputs([f"{tmp_path}/s.tar"], chunk_size=2)

    assert lost(inputs) == [("s.tar/a", "missing_image"), ("s.tar/c\nd", "bad_key")]


@settings(max_examples=25)
@given(
    names=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=12),
    size=st.integers(1, 5),
)
def test_the_fingerprint_tells_inputs_apart_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], size: int
) -> None:
    folder = tmp_path_factory.mktemp("lists")
    lists = {"same": names, "more": [*names, "d"], "turned": names[::-1]}
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines))
    found = {name: find_inputs([str(folder / name)], chunk_size=size).fingerprint for name in lists}

    assert found["same"] == find_inputs([str(folder / "same")], chunk_size=size).fingerprint
    assert found["same"] != found["more"]
    assert (found["same"] == found["turned"]) == (names == names[::-1])


def test_chunks_are_small_to_send_to_a_process(tmp_path: Path) -> None:
    """A million paths are not a million objects."""
    import pickle

    (tmp_path / "list").write_text("".join(f"photo-{i:07d}.jpg\n" for i in range(20_000)))
    inputs = find_inputs([str(tmp_path / "list")], chunk_size=1024)

    assert len(pickle.dumps(inputs.chunks)) < 20_000 * 20
    assert len(keys(inputs)) == 20_000
    samples = find_inputs([shard(tmp_path, "s", 3)], chunk_size=2).chunks[0]
    assert samples.offsets.dtype == np.int64  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "nowhere does not exist"),
        ("nowhere-{0..3}.tar", ValueError, "does not"),
        ("empty", ValueError, "must hold images .*none among 1 files"),
        ("both", ValueError, "image files or tar shards; .* has 1 and 1"),
        ("blank.txt", ValueError, "one path a line; .*blank.txt holds none"),
        ("binary", ValueError, "a text file of paths; .*binary is none of them"),
        ("nul", ValueError, "one path a line"),
    ],
)
def test_an_input_that_names_nothing_is_refused_with_what_it_must_be(
    tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    make(tmp_path, "empty/notes.txt", "both/a.jpg", "both/b.tar")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "nul").write_bytes(b"a\0b\n")

    with pytest.raises(error, match=message):
        find_inputs([str(tmp_path / name)], chunk_size=4)


def test_two_shards_of_one_name_are_refused_since_their_keys_would_be_alike(
    tmp_path: Path,
) -> None:
    paths = [shard(tmp_path / name, "s", 1) for name in ("a", "b")]

    with pytest.raises(ValueError, match="different file names"):
        find_inputs(paths, chunk_size=4)
    with pytest.raises(ValueError, match="different file names"):
        find_inputs([paths[0], paths[0]], chunk_size=4)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        find_inputs(paths[:1], chunk_size=0)
