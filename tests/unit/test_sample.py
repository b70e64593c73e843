from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from packer.errors import SkipSample
from packer.sample import Sample, as_sample
from tests.helpers.samples import noise, png

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
        ({"image": PNG, "label": torch.tensor(3)}, None, 3),
        ({"image": PNG, "label": [0, 1.5]}, None, (0.0, 1.5)),
        ({"image": PNG, "label": torch.tensor([0.0, 0.5])}, None, (0.0, 0.5)),
        ({"image": PNG, "label": np.ones(2, np.float32)}, None, (1.0, 1.0)),
        ((PNG, "a"), ("a",), None),
        ((PNG, ["a", "b"]), ("a", "b"), None),
        ([PNG, 3], None, 3),
        ((PNG, np.array([1, 0])), None, (1.0, 0.0)),
        ((PNG, None), None, None),
    ],
)
def test_captions_and_labels_are_read_in_every_form(
    value: Any, captions: tuple[str, ...] | None, label: object
) -> None:
    sample = as_sample(value)
    assert (sample.captions, sample.label, sample.image) == (captions, label, PNG)
    assert type(sample.label) is type(label)


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        "a string of two"[:2],
        (PNG,),
        (PNG, "a", 1),
        {"jpg": PNG},
        {"image": PNG, "caption": b"bytes"},
        {"image": PNG, "caption": ["a", 1]},
        {"image": PNG, "label": 0.5},
        {"image": PNG, "label": "cat"},
        {"image": PNG, "label": []},
        {"image": PNG, "label": [[1, 2]]},
        (PNG, {"caption": "a"}),
        7,
    ],
)
def test_anything_else_is_a_clear_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"must (be|have)"):
        as_sample(value)


@pytest.mark.parametrize("value", [None, {"image": None, "caption": "a"}, (None, "a")])
def test_an_absent_image_is_skipped_not_fatal(value: Any) -> None:
    with pytest.raises(SkipSample) as error:
        as_sample(value)
    assert error.value.cause == "missing_image"


def test_the_key_is_given_or_the_crc_of_the_content() -> None:
    assert as_sample({"image": PNG, "key": 7}).key == "7"
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
