"""What a user gets from bad input: one claim a test, from tar shards and from a collator.

A bad sample lies between good ones, whose pixels must come through bit by bit. Everything that was
read is in a batch or counted by its cause.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from packer.collate import PackingCollator
from packer.errors import TooManyFailures
from packer.plan.drop import BetaDrop, ConstantDrop
from packer.plan.place import Placement
from packer.plan.resize import UniformSide
from packer.stream import PackedStream
from tests.helpers.bad_input import (
    NEIGHBOURS,
    Members,
    Outcome,
    P,
    between,
    check_neighbours,
    colour_modes,
    config,
    encode,
    good,
    image,
    members_of,
    outcome,
    stream,
    write_tar,
)
from tests.helpers.damage import gif, png_that_claims
from tests.helpers.samples import noise, png


def run(folder: Path, bad: dict[str, Any], **options: Any) -> Outcome:
    """Send a bad sample through a tar shard and through a collator, which must agree on it."""
    shard = write_tar(folder / "s.tar", between(members_of({"key": "b"} | bad)))
    streamed = stream(shard, config(**options))
    samples = [good(key) for key in NEIGHBOURS]
    collated = outcome(
        [PackingCollator(config(**options))([*samples[:2], {"key": "b"} | bad, *samples[2:]])]
    )

    check_neighbours(streamed)
    check_neighbours(collated)
    assert streamed.stats.samples_read == collated.stats.samples_read == 5
    assert streamed.stats.skipped == collated.stats.skipped
    assert streamed.stats.noted == collated.stats.noted == {}
    assert streamed.texts == collated.texts
    for key, mine in streamed.images.items():
        assert mine.grid == collated.images[key].grid
        assert torch.equal(mine.patches, collated.images[key].patches)
    return streamed


# Images that are none

PHOTO = encode(Image.fromarray(noise(64, 64)), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="zero-byte"),
        pytest.param(b"<!DOCTYPE html><title>404</title>", id="HTML"),
        pytest.param(b"no image", id="text"),
        pytest.param(PHOTO[: len(PHOTO) // 2], id="truncated JPEG"),
    ],
)
def test_zero_byte_html_or_text_named_jpg_and_a_truncated_jpeg_are_skipped_and_counted(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(tmp_path, image(data))
    assert found.stats.skipped == {"decode_error": 1}
    assert found.images.keys() == set(NEIGHBOURS)
    assert any("skipped s.tar/b: decode_error" in message for message in caplog.messages)


def test_a_setting_keeps_truncated_jpegs(tmp_path: Path) -> None:
    found = run(tmp_path, image(PHOTO[: len(PHOTO) // 2]), keep_truncated=True)
    assert found.stats.skipped == {}
    assert found.texts["b"] == "the bad one"
    whole = run(tmp_path, image(PHOTO))
    np.testing.assert_array_equal(found.pixels("b")[:P], whole.pixels("b")[:P])
    assert np.ptp(found.pixels("b")[-P:]) == 0, "what is missing is one grey"


@pytest.mark.parametrize(
    ("data", "options"),
    [
        pytest.param(png_that_claims(13_343, 13_341), {}, id="178 M and a few"),
        pytest.param(png_that_claims(60_000, 60_000), {}, id="a PNG of 3.6 G"),
        pytest.param(gif((8, 8), (60_000, 60_000), 2), {}, id="a GIF of 3.6 G"),
        pytest.param(png(40, 40), {"max_pixels": 1599}, id="one above a limit of one's own"),
    ],
)
def test_a_pixel_count_above_a_limit_is_skipped_counted_and_never_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, options: dict[str, int]
) -> None:
    decoded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def spied(self: ImageFile.ImageFile) -> Any:
        decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", spied)
    found = run(tmp_path, image(data), **options)
    assert found.stats.skipped == {"too_many_pixels": 1}
    assert set(decoded) == {(P, 2 * P)}, "only the neighbours are decoded"


# Images of every kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_width_and_height_swapped_before_planning(
    tmp_path: Path, orientation: int
) -> None:
    stored = noise(P, 3 * P)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = run(tmp_path, image(encode(Image.fromarray(stored), exif=exif)))
    assert found.stats.skipped == {}
    assert found.images["b"].grid == ((3, 1) if orientation >= 5 else (1, 3))
    np.testing.assert_array_equal(found.pixels("b"), upright)


@pytest.mark.parametrize("name", colour_modes())
def test_cmyk_palette_la_1_bit_16_bit_grey_and_alpha_are_converted_to_rgb(
    tmp_path: Path, name: str
) -> None:
    """Alpha is matted on white, 16 bits are scaled and not clipped."""
    data, expected, off = colour_modes()[name]
    found = run(tmp_path, image(data))
    assert found.stats.skipped == {}
    np.testing.assert_allclose(found.pixels("b"), expected, atol=off, rtol=0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animated_gif_or_webp_gives_its_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (P, P), colour) for colour in ("#fa0000", "#00fa00", "#0000fa")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    found = run(tmp_path, image(data))
    assert found.stats.skipped == {}
    np.testing.assert_array_equal(found.pixels("b"), np.asarray(frames[0]))


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1)])
def test_a_3000_x_1_strip_has_at_least_one_patch_a_side_and_over_max_aspect_ratio_is_skipped(
    tmp_path: Path, height: int, width: int
) -> None:
    strip = image(png(height, width))
    rows, cols = run(tmp_path, strip).images["b"].grid
    assert min(rows, cols) == 1
    assert 1 < max(rows, cols) <= 64

    assert run(tmp_path, strip, max_aspect_ratio=3000.0).stats.skipped == {}
    over = run(tmp_path, strip, max_aspect_ratio=2999.0)
    assert over.stats.skipped == {"aspect_ratio": 1}


def test_an_image_over_the_token_budget_is_resized_within_it_and_never_truncated(
    tmp_path: Path,
) -> None:
    ramps = np.zeros((120, 200, 3), np.uint8)
    ramps[..., 0] = np.linspace(0, 255, 200)
    ramps[..., 1] = np.linspace(0, 255, 120)[:, None]
    found = run(tmp_path, image(encode(Image.fromarray(ramps))), max_tokens=24)
    rows, cols = found.images["b"].grid
    assert (rows, cols) == (3, 6)
    assert len(found.images["b"].positions) == rows * cols
    whole = Image.fromarray(ramps).resize((cols * P, rows * P), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(found.pixels("b"), np.asarray(whole), atol=2)


# Captions


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_a_missing_or_empty_caption_is_skipped_and_counted_or_kept_by_a_setting(
    tmp_path: Path, caption: str | None
) -> None:
    bad = {"image": png(P, P)} | ({} if caption is None else {"caption": caption})
    skipped = run(tmp_path, bad)
    assert skipped.stats.skipped == {"missing_caption": 1}
    kept = stream(
        write_tar(tmp_path / "s.tar", between(members_of({"key": "b"} | bad))),
        config(missing_caption="keep"),
    )
    check_neighbours(kept)
    assert kept.stats.skipped == {}
    assert kept.texts["b"] == ""


def test_a_caption_that_is_not_utf_8_is_decoded_with_replacement_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = between([("b.png", png(P, P)), ("b.txt", b"caf\xe9 \xff")])
    found = stream(write_tar(tmp_path / "s.tar", members), config())
    check_neighbours(found)
    assert found.texts["b"] == "caf\ufffd \ufffd"
    assert (found.stats.skipped, found.stats.noted) == ({}, {"caption_replaced": 1})
    assert any("noted caption_replaced" in m and "s.tar/b" in m for m in caplog.messages)


# Shards


@pytest.mark.parametrize(
    ("member", "into", "keys", "skipped", "noted"),
    [
        pytest.param("b.jpg", 600, ["a0", "a1"], {"truncated_shard": 1}, {}, id="in an image"),
        pytest.param("b.txt", 515, ["a0", "a1"], {"truncated_shard": 1}, {}, id="in a caption"),
        pytest.param("b.jpg", 99, ["a0", "a1"], {"truncated_shard": 1}, {}, id="in a header"),
        pytest.param(
            "z0.jpg",
            0,
            ["a0", "a1", "b"],
            {},
            {"unterminated_shard": 1},
            id="at a header, between samples",
        ),
        pytest.param(
            "b.txt",
            0,
            ["a0", "a1"],
            {"missing_caption": 1},
            {"unterminated_shard": 1},
            id="at a header, within a sample",
        ),
        pytest.param(
            "z1.txt",
            1024,
            ["a0", "a1", "b", "z0", "z1"],
            {},
            {"unterminated_shard": 1},
            id="without end blocks",
        ),
    ],
)
def test_a_tar_cut_inside_a_member_at_a_header_or_without_end_blocks_gives_its_readable_samples(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    member: str,
    into: int,
    keys: list[str],
    skipped: dict[str, int],
    noted: dict[str, int],
) -> None:
    """A partial sample does not come out, and the shard after the cut one is untouched."""
    path = tmp_path / "cut.tar"
    write_tar(
        path, between(members_of({"key": "b", "image": png(3 * P, 3 * P), "caption": "a caption"}))
    )
    with tarfile.open(path) as tar:
        at = tar.getmember(member).offset + into
    path.write_bytes(path.read_bytes()[:at])
    second = write_tar(tmp_path / "next.tar", members_of(good("n9")))

    found = stream([str(path), second], config())

    assert found.images.keys() == {*keys, "n9"}
    check_neighbours(found, [*(key for key in keys if key != "b"), "n9"])
    assert (found.stats.skipped, found.stats.noted) == (skipped, noted)
    [cause] = [c for c in (skipped | noted) if c.endswith("_shard")]
    assert any(cause in message and "cut.tar" in message for message in caplog.messages)


def sample_members(key: str) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    """Image and caption of a key that say whose they are."""
    return (f"{key}.jpg", png(P, P, ord(key[-1]))), (f"{key}.txt", f"of {key}".encode())


C, D = sample_members("c"), sample_members("d")


@pytest.mark.parametrize(
    ("members", "keys", "skipped"),
    [
        pytest.param([*C, *D], ["c", "d"], {}, id="as it should be"),
        pytest.param(
            [C[0], D[0], C[1], D[1]],
            [],
            {"missing_caption": 2, "duplicate_key": 2},
            id="interleaved",
        ),
        pytest.param([*C, *C, *D], ["d"], {"duplicate_key": 1}, id="twice in a row"),
        pytest.param([*C, *D, *C], ["c", "d"], {"duplicate_key": 1}, id="twice"),
        pytest.param(
            [C[0], *D, C[1]],
            ["d"],
            {"missing_caption": 1, "duplicate_key": 1},
            id="one within another",
        ),
    ],
)
def test_interleaved_or_duplicate_keys_are_counted_and_samples_never_merged(
    tmp_path: Path, members: Members, keys: list[str], skipped: dict[str, int]
) -> None:
    found = stream(write_tar(tmp_path / "s.tar", between(members)), config())
    check_neighbours(found)
    assert found.images.keys() == {*NEIGHBOURS, *keys}
    assert found.stats.skipped == skipped
    for key in keys:
        assert found.texts[key] == f"of {key}"
        np.testing.assert_array_equal(found.pixels(key), noise(P, P, ord(key)))


def test_a_b_jpg_beside_a_c_jpg_are_two_samples(tmp_path: Path) -> None:
    members = [*sample_members("a.b"), *sample_members("a.c")]
    found = stream(write_tar(tmp_path / "s.tar", between(members)), config())
    check_neighbours(found)
    assert found.stats.skipped == {}
    for key in ("a.b", "a.c"):
        assert found.texts[key] == f"of {key}"
        np.testing.assert_array_equal(found.pixels(key), noise(P, P, ord(key[-1])))


def three_shards(folder: Path) -> list[str]:
    keys = [("a0", "a1"), ("m0", "m1"), ("z0", "z1")]
    return [
        write_tar(folder / f"s{i}.tar", [m for key in part for m in members_of(good(key))])
        for i, part in enumerate(keys)
    ]


def remove(path: Path) -> None:
    path.unlink()


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()  # permissions would not stop root


@pytest.mark.parametrize("damage", [remove, make_unreadable])
def test_a_shard_missing_or_unreadable_at_run_time_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    opened = PackedStream(
        three_shards(tmp_path), config(), sequences_per_batch=2, epochs=1, shuffle_shards=False
    )
    damage(tmp_path / "s1.tar")
    found = outcome(list(opened))
    check_neighbours(found)
    assert found.images.keys() == set(NEIGHBOURS)
    assert (found.stats.skipped, found.stats.samples_read) == ({"missing_shard": 1}, 5)
    assert any("missing_shard" in m and "s1.tar" in m for m in caplog.messages)


def test_shards_missing_at_run_time_are_fatal_after_k_in_a_row(tmp_path: Path) -> None:
    shards = three_shards(tmp_path)
    settings = config(max_failures_in_row=2)
    opened = PackedStream(shards, settings, sequences_per_batch=2, epochs=1, shuffle_shards=False)
    for path in shards[:2]:
        Path(path).unlink()
    with pytest.raises(TooManyFailures, match=r"fewer than 2 .*missing_shard: .*s1\.tar"):
        list(opened)


@pytest.mark.parametrize("spec", ["none.tar", "none-{000..002}.tar", "none-*.tar", "folder", []])
def test_a_local_list_that_expands_to_nothing_is_an_error_at_start(
    tmp_path: Path, spec: str | list[str]
) -> None:
    (tmp_path / "folder").mkdir()
    shards = str(tmp_path / spec) if isinstance(spec, str) else spec
    with pytest.raises(ValueError, match="must") as caught:
        PackedStream(shards, config(), sequences_per_batch=1)
    assert str(spec or "empty") in str(caught.value)


# Settings


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: config(max_tokens=65), r"max_tokens must be at most seq_len \(64\).* got 65\. L"),
    (lambda: ConstantDrop(1.0), r"drop_rate must be in \[0, 1\); got 1\.0\."),
    (lambda: BetaDrop(0.5, 1.0), r"need 0 < mean < maximum < 1; got mean=0\.5, maximum=1\.0\."),
    (lambda: Placement("tetris"), r"strategy must be one of 'exact', .*; got 'tetris'"),
    (lambda: config(resize="stretch"), r"resize must be one of 'shrink_only'.*; got 'stretch'"),
    (lambda: config(decode="half"), r"decode must be one of 'reduced', 'full'; got 'half'"),
    (lambda: config(token_drop=0.5), r"token_drop must be one of NoDrop, .*; got 0\.5"),
    (lambda: config(missing_caption="no"), r"missing_caption must be one of .*; got 'no'"),
    (lambda: config(patch_size=0), r"patch_size must be a positive integer; got 0"),
    (lambda: config(max_pixels=1.5), r"max_pixels must be a positive integer; got 1\.5"),
    (lambda: config(max_aspect_ratio=0.5), r"max_aspect_ratio must be at least 1; got 0\.5"),
    (lambda: config(max_failures_in_row=0), r"max_failures_in_row must be a positive .* got 0"),
    (lambda: UniformSide(9, 8), r"UniformSide: .*got"),
    (
        lambda: PackedStream("none.tar", config(), sequences_per_batch=0),
        r"sequences_per_batch must be at least 1; got 0",
    ),
]


@pytest.mark.parametrize(
    ("make", "message"), WRONG, ids=[message.split(" ")[0] for _, message in WRONG]
)
def test_wrong_settings_are_a_value_error_at_construction(
    make: Callable[[], Any], message: str
) -> None:
    """It says what must hold, what was found and, where that is not the list itself, what to do."""
    with pytest.raises(ValueError, match=message):
        make()
