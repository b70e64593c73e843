import io
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.errors import SkipSample
from packer.sample import Sample, as_sample
from tests.helpers.samples import assert_same, image_samples, make_shards, noise, png

PNG = png(8, 8)


@pytest.mark.parametrize(
    ("value", "captions", "label"),
    [
        ({"image": PNG}, None, None),
        ({"image": PNG, "caption": "a"}, ("a",), None),
        ({"image": PNG, "caption": ["a", "b"]}, ("a", "b"), None),
        ({"image": PNG, "caption": []}, None, None),
        ({"image": PNG, "caption": ""}, ("",), None),
        ({"image": PNG, "label": 3, "unknown": 1}, None, 3),
        ({"image": PNG, "label": True}, None, 1),
        ({"image": PNG, "label": np.int32(3)}, None, 3),
        ({"image": PNG, "label": np.bool_(True)}, None, 1),
        ({"image": PNG, "label": np.array(3)}, None, 3),
        ({"image": PNG, "label": torch.tensor(3)}, None, 3),
        ({"image": PNG, "label": [0, 1.5]}, None, (0.0, 1.5)),
        ({"image": PNG, "label": [np.float32(0.5), np.int8(1)]}, None, (0.5, 1.0)),
        ({"image": PNG, "label": torch.tensor([0.0, 0.5])}, None, (0.0, 0.5)),
        ({"image": PNG, "label": np.ones(2, np.float32)}, None, (1.0, 1.0)),
        ((PNG, "a"), ("a",), None),
        ((PNG, ["a", "b"]), ("a", "b"), None),
        ((PNG, ("a", "b")), ("a", "b"), None),
        ((PNG, np.array(["a", "b"])), ("a", "b"), None),
        ((PNG, np.str_("a")), ("a",), None),
        ([PNG, 3], None, 3),
        ((PNG, np.int64(3)), None, 3),
        ((PNG, np.array([1, 0])), None, (1.0, 0.0)),
        ((PNG, None), None, None),
        # Hugging Face rows
        ({"image": PNG, "text": "a"}, ("a",), None),
        ({"image": PNG, "text": ["a", "b"], "label": 3}, ("a", "b"), 3),
        ({"image": PNG, "text": "a", "caption": "a"}, ("a",), None),
        ({"image": PNG, "text": "a", "caption": ["a"]}, ("a",), None),
        ({"image": PNG, "text": "a", "caption": None}, ("a",), None),
        ({"image": PNG, "text": "a", "caption": []}, ("a",), None),
        (UserDict({"image": PNG, "text": "a"}), ("a",), None),
        # webdataset samples, decoded or not
        ({"__key__": "k", "__url__": "u", "jpg": PNG, "txt": "a", "cls": 3}, ("a",), 3),
        ({"__key__": "k", "png": PNG, "txt": b"a \xc3\xa9\xff", "cls": b"3"}, ("a é�",), 3),
        ({"__key__": "k", "jpg": None, "webp": PNG, "json": {"caption": "b"}}, None, None),
    ],
)
def test_captions_and_labels_are_read_in_every_form(
    value: Any, captions: tuple[str, ...] | None, label: object
) -> None:
    sample = as_sample(value)
    assert (sample.captions, sample.label, sample.image) == (captions, label, PNG)
    assert type(sample.label) is type(label)
    assert all(type(caption) is str for caption in sample.captions or ())


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        "a string of two"[:2],
        (PNG,),
        (PNG, "a", 1),
        {"img": PNG},
        {"image": PNG, "caption": b"bytes"},
        {"image": PNG, "text": b"bytes"},
        {"image": PNG, "caption": ["a", 1]},
        {"image": PNG, "caption": np.array([["a"], ["b"]])},
        {"image": PNG, "label": 0.5},
        {"image": PNG, "label": np.float64(0.5)},
        {"image": PNG, "label": "cat"},
        {"image": PNG, "label": b"3"},
        {"image": PNG, "label": []},
        {"image": PNG, "label": [[1, 2]]},
        (PNG, {"caption": "a"}),
        {"image": {}, "text": "a"},
        {"image": {"bytes": PNG, "path": "a.png", "size": 3}},
        {"image": {"data": PNG}},
        {"image": {"bytes": None, "path": 7}},
        7,
    ],
)
def test_anything_else_is_a_clear_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"must (be|have)"):
        as_sample(value)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"image": PNG, "caption": "a", "text": "b"}, "'caption' and 'text' must be the same"),
        ({"image": PNG, "text": "a", "txt": ["a", "b"]}, "'text' and 'txt' must be the same"),
        ({"image": PNG, "label": 1, "cls": 2}, "'label' and 'cls' must be the same"),
        ({"image": PNG, "key": "a", "__key__": "b"}, "'key' and '__key__' must be the same"),
        ({"jpg": PNG, "png": PNG}, "must have one image; got 'jpg', 'png'"),
        ({"image": PNG, "jpg": PNG}, "must have one image; got 'image', 'jpg'"),
    ],
)
def test_two_names_of_one_thing_are_never_guessed_between(value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        as_sample(value)


@pytest.mark.parametrize("image", ["cat.png", np.str_("cat.png")])
def test_only_a_path_object_names_a_file(image: str) -> None:
    with pytest.raises(ValueError, match=r"cat\.png.*pathlib\.Path"):
        as_sample((image, 1))


def test_an_image_with_channels_first_is_an_error_that_says_how_to_turn_it() -> None:
    with pytest.raises(ValueError, match=r"permute\(1, 2, 0\) turns \(3, H, W\)"):
        as_sample((torch.zeros(3, 8, 8, dtype=torch.uint8), 1))
    with pytest.raises(ValueError, match=r"permute\(1, 2, 0\)"):
        PackingCollator(PackerConfig())([{"key": "k", "image": np.zeros((3, 8, 8), np.uint8)}])


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"image": None, "caption": "a"},
        (None, "a"),
        {"image": {"bytes": None, "path": None}},
        {"image": {"bytes": None}},
        {"__key__": "k", "jpg": None, "png": None, "txt": "a"},
        {"image": {"bytes": None, "path": "no/such/file.png"}},
        (Path("no/such/file.png"), "a"),
        (Path(__file__).parent, "a"),
    ],
)
def test_an_absent_image_is_skipped_not_fatal(value: Any) -> None:
    with pytest.raises(SkipSample) as error:
        as_sample(value)
    assert error.value.cause == "missing_image"


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(SkipSample, match=r"file\.png: No such file"):
        as_sample((Path("no/such/file.png"), 1))


def test_a_label_member_that_is_no_number_is_skipped_as_in_a_stream() -> None:
    with pytest.raises(SkipSample) as error:
        as_sample({"jpg": PNG, "cls": b"cat"})
    assert error.value.cause == "bad_label"


def test_bytes_are_used_where_a_row_has_both_bytes_and_path(tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(png(8, 8, seed=1))
    assert as_sample({"image": {"bytes": PNG, "path": str(other)}}).image == PNG
    assert as_sample({"image": {"bytes": None, "path": str(other)}}).image == png(8, 8, seed=1)
    assert as_sample({"image": {"bytes": PNG, "path": "no/such/file"}}).image == PNG


def test_the_key_is_given_or_the_crc_of_the_content() -> None:
    assert as_sample({"image": PNG, "key": 7}).key == "7"
    assert as_sample({"jpg": PNG, "__key__": "k"}).key == "k"
    assert as_sample({"image": PNG, "key": 0}, key="other").key == "0"
    assert as_sample({"image": PNG}, key="other").key == "other"
    assert as_sample((PNG, "a"), key="other").key == "other"
    assert as_sample((PNG, "a")).key == as_sample({"image": PNG}).key
    assert as_sample((PNG, "a")).key != as_sample((png(8, 8, seed=1), "a")).key
    pixels = noise(8, 8)
    keys = {as_sample((form, 1)).key for form in (pixels, torch.from_numpy(pixels))}
    assert keys == {as_sample((Image.fromarray(pixels), 1)).key}


def test_a_sample_passes_through() -> None:
    sample = Sample("k", PNG)
    assert as_sample(sample) is sample


def test_the_draw_selects_one_of_the_captions() -> None:
    sample = Sample("k", PNG, ("a", "b", "c"))
    assert [sample.caption(draw) for draw in (0, 1, 2, 3, 2**64 - 1)] == ["a", "b", "c", "a", "a"]
    assert Sample("k", PNG).caption(5) is None


def every_form(pixels: np.ndarray, path: Path) -> list[Any]:
    """One captioned image as every kind of dataset would hand it over; the key is "k"."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    path.write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    return [
        {"key": "k", "image": pixels, "caption": "a"},
        {"key": "k", "image": torch.from_numpy(pixels), "caption": ["a"]},
        {"key": "k", "image": Image.fromarray(pixels), "text": "a"},
        {"key": "k", "image": opened, "text": "a"},
        {"key": "k", "image": data, "caption": "a", "text": "a"},
        {"key": "k", "image": bytearray(data), "caption": np.array(["a"])},
        {"key": "k", "image": path, "caption": ("a",)},
        {"key": "k", "image": {"bytes": data, "path": "elsewhere.png"}, "text": "a"},
        {"key": "k", "image": {"bytes": None, "path": str(path)}, "text": ["a"]},
        {"__key__": "k", "__url__": "s.tar", "png": data, "txt": b"a", "json": b"{}"},
        {"__key__": "k", "png": Image.fromarray(pixels), "txt": "a", "json": {}},
        {"__key__": "k", "jpg": None, "png": {"bytes": data, "path": "k.png"}, "txt": "a"},
        UserDict({"key": "k", "image": data, "caption": "a"}),
        Sample("k", data, ("a",)),
    ]


def test_every_form_gives_the_same_batch(tmp_path: Path) -> None:
    collate = PackingCollator(PackerConfig(patch_size=8, seq_len=16))
    first, *others = [collate([form]) for form in every_form(noise(16, 24), tmp_path / "k.png")]
    first.check()
    assert (first.keys, first.texts, first.stats.tokens) == (("k",), ("a",), 6)
    for other in others:
        assert_same(first, other)


@pytest.mark.parametrize("decode", [None, "pil", "rgb8"])
def test_samples_of_a_webdataset_pipeline_are_taken_as_they_come(
    tmp_path: Path, decode: str | None
) -> None:
    import webdataset  # imported here: it takes a second
    from webdataset.tariterators import group_by_keys, tar_file_expander

    samples = image_samples(3)
    (shard,) = make_shards(tmp_path, samples, per_shard=3)
    # The stages of a WebDataset, which itself leaves the shard open.
    with open(shard, "rb") as file:
        members = list(group_by_keys(tar_file_expander([{"url": shard, "stream": file}])))
    decoded = members if decode is None else list(webdataset.decode(decode)(members))
    collate = PackingCollator(PackerConfig(patch_size=8, seq_len=64))
    assert_same(collate(decoded), collate(samples))


def test_pairs_of_every_form_of_image_give_the_same_batch(tmp_path: Path) -> None:
    """Pairs have no key, and CRCs of bytes and of pixels differ: only the keys may do so."""
    collate = PackingCollator(PackerConfig(patch_size=8, seq_len=16))
    images = [form["image"] for form in every_form(noise(16, 24), tmp_path / "k.png")[:9]]
    first, *others = [collate([(image, np.int64(3))]) for image in images]
    assert first.labels is not None
    assert first.labels.tolist() == [3]
    for other in others:
        assert_same(first, other, ignore=["keys"])
